"""An OCI registry in memory, with what Debian's lacks: the referrers API, tokens, and lies."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.shipping.serving import Answering, running

INDEX = "application/vnd.oci.image.index.v1+json"
_PATH = re.compile(r"/v2/(.+)/(blobs|manifests|referrers)/(.*)")


class FakeRegistry(ThreadingHTTPServer):
    """``lie``: answers a request by itself and returns True, or leaves it to the registry."""

    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.host = f"127.0.0.1:{self.server_port}"
        self.login: str | None = None  # NAME:PASSWORD, if tokens are asked for
        self.lie: Callable[[_Handler], bool] = lambda _: False
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.seen: list[str] = []


def self_signed(path: Path) -> Path:
    """A certificate of 127.0.0.1 and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    pem, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(pem, kind, serialization.NoEncryption())
    path.write_bytes(made.public_bytes(pem) + secret)
    return path


@contextmanager
def registry_in_memory(certificate: Path | None = None) -> Iterator[FakeRegistry]:
    """``certificate``: speaks TLS with it and its key, which are in that file."""
    with running(FakeRegistry(certificate)) as server:
        yield server


class _Handler(Answering):
    server: FakeRegistry

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        self.server.seen.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.startswith("/token"):
            self._token()
        elif self._admitted() and not self.server.lie(self):
            found = _PATH.fullmatch(urlsplit(self.path).path)
            assert found is not None, self.path
            getattr(self, f"_{found[2]}")(found[3], body)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _token(self) -> None:
        expected = base64.b64encode(str(self.server.login).encode()).decode()
        if self.headers.get("Authorization") != f"Basic {expected}":
            self.answer(401)
            return
        (scope,) = parse_qs(urlsplit(self.path).query)["scope"]
        self.answer(200, json.dumps({"token": quote(scope)}).encode())

    def _admitted(self) -> bool:
        """As docker's: a token is for reading or for writing, as the refusal says."""
        if self.server.login is None:
            return True
        scope = "pull" if self.command in ("GET", "HEAD") else "pull,push"
        enough = {scope, "pull,push"}
        if self.headers.get("Authorization") in {f"Bearer {quote(one)}" for one in enough}:
            return True
        realm = f'realm="http://{self.server.host}/token",service="test",scope="{scope}"'
        self.answer(401, Www_Authenticate=f"Bearer {realm}")
        return False

    def _blobs(self, name: str, body: bytes) -> None:
        if self.command == "POST":
            self.answer(202, Location=f"{urlsplit(self.path).path}1")
        elif self.command == "PUT":
            (digest,) = parse_qs(urlsplit(self.path).query)["digest"]
            self.server.blobs[digest] = body
            self.answer(201)
        else:
            self._found(self.server.blobs.get(name))

    def _manifests(self, name: str, body: bytes) -> None:
        if self.command == "PUT":
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            self.server.manifests |= {name: body, digest: body}
            self.answer(201, Docker_Content_Digest=digest)
        else:
            self._found(self.server.manifests.get(name))

    def _referrers(self, name: str, body: bytes) -> None:
        found = [
            {"mediaType": json.loads(raw)["mediaType"], "digest": digest, "size": len(raw),
             "artifactType": json.loads(raw)["artifactType"]}
            for digest, raw in self.server.manifests.items()
            if digest.startswith("sha256:") and _subject(raw) == name
        ]  # fmt: skip
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": found}
        self.answer(200, json.dumps(index).encode(), Content_Type=INDEX)

    def _found(self, data: bytes | None) -> None:
        self.answer(404) if data is None else self.answer(200, data)


def _subject(raw: bytes) -> Any:
    return (json.loads(raw).get("subject") or {}).get("digest")
