"""OCI registries, by ``oras``: a patch is an artifact, its signatures are its referrers.

Image and distribution specification 1.1. A registry without the referrers API (such as
``docker-registry`` 2.8) gets the index under the fallback tag that the specification has for it.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..address import is_loopback
from ..errors import ShippingError, UsageError
from ..patch import canonical
from ..patch.container import MAX_FILE_BYTES
from .needs import needed
from .places import MAX_BESIDE, Parcel, failed, most_of, named_by_content
from .session import opened

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
PATCH = "application/vnd.vllm-patcher.patch.v1+safetensors"
SIGNATURE = "application/vnd.dev.sigstore.bundle.v0.3+json"
REPORT = "application/vnd.vllm-patcher.report.v1"
SUFFIX = "org.vllm-patcher.suffix"  # annotation: what is put after the patch file's name
MAX_MANIFEST_BYTES = 1 << 20
Descriptor = dict[str, Any]

# The specification's grammar, with the host that it leaves to the client: never a default one.
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(
    r"oci://(?P<host>(?:[a-z0-9.-]+|\[[0-9a-f:]+\])(?::[0-9]{1,5})?)/"
    rf"(?P<repository>{_COMPONENT}(?:/{_COMPONENT})*)"
    rf"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}}))?(?:@(?P<digest>{_DIGEST.pattern}))?",
)


class OciArtifact:
    """``oci://host[:port]/repository[:tag]`` or ``…@sha256:…``."""

    def __init__(self, url: str, *, insecure: bool = False) -> None:
        self.url = url
        self._at = _container(url)
        here = is_loopback(f"http://{self._at.registry}")
        self._registry = opened(plain=insecure or here, here=here)

    def send(self, parcel: Parcel) -> str:
        """Put patch and referrers there; the URL returned has the manifest's digest."""
        with self._trouble("Can't push to"):
            self._registry.auth.load_configs(self._at)
            self._put_blob(EMPTY, b"{}")  # the config that every manifest of ours names
            layers = [self._put_blob(PATCH, parcel.data)]
            subject = self._put(_manifest(PATCH, layers), str(self._at.digest or self._at.tag))
            told = []
            for suffix, data in parcel.beside.items():
                kind = SIGNATURE if suffix.endswith(".sig") else REPORT
                manifest = _manifest(kind, [self._put_blob(kind, data)], subject, suffix)
                named = hashlib.sha256(_bytes(manifest)).hexdigest()
                told.append({**self._put(manifest, f"sha256:{named}"), "artifactType": kind})
            self._tell_referrers(subject, told)
        return f"oci://{self._at.registry}/{self._at.api_prefix}@{subject['digest']}"

    def fetch(self) -> Parcel:
        """The patch and its referrers; every blob is what its digest says."""
        with self._trouble("Can't pull from"):
            self._registry.auth.load_configs(self._at)
            raw = self._get(str(self._at.digest or self._at.tag), (MANIFEST,))
            if self._at.digest and self._at.digest != f"sha256:{hashlib.sha256(raw).hexdigest()}":
                raise ShippingError(f"{self.url} gave another manifest than its digest.", "")
            data = self._layer(raw, PATCH, MAX_FILE_BYTES)[1]
            beside: dict[str, bytes] = {}
            for one in self._referrers(f"sha256:{hashlib.sha256(raw).hexdigest()}")[:MAX_BESIDE]:
                try:
                    suffix, content = self._beside(str(one.get("digest")), one["artifactType"])
                except (ShippingError, ValueError, LookupError, TypeError):
                    continue  # anybody may refer to the patch; a bad one is nobody's signature
                if beside.get(suffix, content) != content and suffix.endswith(".sig"):
                    suffix = named_by_content(content)  # two people's, of the same name
                beside[suffix] = content
        return Parcel(data, beside)

    # -- manifests and blobs ---------------------------------------------------------------------

    def _beside(self, digest: str, kind: str) -> tuple[str, bytes]:
        _check_digest(digest)
        raw = self._get(digest, (MANIFEST,))
        _check(raw, digest)
        manifest, content = self._layer(raw, kind, most_of(".sig" if kind == SIGNATURE else ""))
        return str((manifest.get("annotations") or {}).get(SUFFIX, "")), content

    def _layer(self, raw: bytes, kind: str, most: int) -> tuple[dict[str, Any], bytes]:
        """A manifest and the one layer of that type that it must have."""
        manifest = canonical.loads(raw)
        found = [one for one in manifest["layers"] if one["mediaType"] == kind]
        if len(found) != 1:
            raise ShippingError(f"{self.url} holds no patch.", "Is that the right repository?")
        size, digest = found[0]["size"], str(found[0]["digest"])
        if type(size) is not int or not 0 <= size <= most:
            raise ShippingError(
                f"{self.url} names {str(size)[:40]} bytes; {most} are read at most.",
                "Is that the right repository?",
            )
        _check_digest(digest)
        answer = self._registry.get_blob(self._at, digest, stream=True)
        content = self._body(answer, size)
        _check(content, digest)
        return manifest, content

    def _get(self, reference: str, kinds: tuple[str, ...]) -> bytes:
        url = f"{self._registry.prefix}://{self._at.manifest_url(reference)}"
        answer = self._registry.do_request(url, headers={"Accept": ", ".join(kinds)}, stream=True)
        return self._body(answer, MAX_MANIFEST_BYTES)

    def _body(self, answer: Any, most: int) -> bytes:
        with answer:
            if answer.status_code == 404:
                raise ShippingError(f"{self.url} isn't there.", "Look at its name and tag.")
            answer.raise_for_status()
            content = bytearray()
            for part in answer.iter_content(1 << 16):
                content += part
                if len(content) > most:
                    raise ShippingError(f"{self.url} sends more than it said.", "Don't trust it.")
        return bytes(content)

    def _put(self, manifest: dict[str, Any], reference: str, kind: str = MANIFEST) -> Descriptor:
        raw = _bytes(manifest)
        url = f"{self._registry.prefix}://{self._at.manifest_url(reference)}"
        headers = {"Content-Type": kind}
        self._registry.do_request(url, "PUT", data=raw, headers=headers).raise_for_status()
        return _descriptor(kind, raw)

    def _put_blob(self, kind: str, data: bytes) -> Descriptor:
        described = _descriptor(kind, data)
        with tempfile.TemporaryDirectory(prefix="patcher-") as folder:
            path = Path(folder) / "blob"
            path.write_bytes(data)
            self._registry.upload_blob(str(path), self._at, described).raise_for_status()
        return described

    # -- referrers -------------------------------------------------------------------------------

    def _referrers(self, digest: str) -> list[Descriptor]:
        url = f"{self._registry.prefix}://{self._at.registry}/v2/{self._at.api_prefix}/referrers/{digest}"
        answer = self._registry.do_request(url, headers={"Accept": INDEX}, stream=True)
        if answer.status_code == 404:
            answer.close()
            return self._fallback(digest)
        return _entries(self._body(answer, MAX_MANIFEST_BYTES))

    def _fallback(self, digest: str) -> list[Descriptor]:
        try:
            return _entries(self._get(_fallback_tag(digest), (INDEX,)))
        except ShippingError:
            return []

    def _tell_referrers(self, subject: Descriptor, told: list[Descriptor]) -> None:
        """Where the registry has no referrers API the pusher keeps the index."""
        url = f"{self._registry.prefix}://{self._at.registry}/v2/{self._at.api_prefix}/referrers/"
        answer = self._registry.do_request(url + subject["digest"], headers={"Accept": INDEX})
        if answer.status_code != 404 or not told:
            return
        known = {one["digest"]: one for one in (*self._fallback(subject["digest"]), *told)}
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": list(known.values())}
        self._put(index, _fallback_tag(subject["digest"]), INDEX)

    @contextmanager
    def _trouble(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ShippingError, UsageError):
            raise
        except Exception as error:  # requests' and oras' own, and what odd JSON makes us raise
            cure = "Is it there, and may you? `docker login` says who."
            raise failed(f"{what} {self.url}", error, cure) from error


def _container(url: str) -> Any:
    """What oras calls a container; its own reading of names takes others to Docker Hub."""
    found = _NAME.fullmatch("oci" + url[3:])
    if found is None:
        raise UsageError(
            f"{url} names no repository of a registry.",
            "Write oci://host[:port]/repository:tag, the repository in small letters.",
        )
    at = needed("oras.container").Container("a")
    at.registry, at.namespace, at.repository = found["host"], None, found["repository"]
    at.tag, at.digest = found["tag"] or "latest", found["digest"]
    return at


def _manifest(
    kind: str, layers: list[Descriptor], subject: Descriptor | None = None, suffix: str = ""
) -> dict[str, Any]:
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": kind,
        "config": _descriptor(EMPTY, b"{}"),
        "layers": layers,
    }
    if subject is not None:
        manifest |= {"subject": subject, "annotations": {SUFFIX: suffix}}
    return manifest


def _descriptor(kind: str, data: bytes) -> Descriptor:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return {"mediaType": kind, "digest": digest, "size": len(data)}


def _bytes(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, separators=(",", ":"), sort_keys=True).encode()


def _entries(raw: bytes) -> list[Descriptor]:
    """The referrers of our kinds that an index names."""
    found = [one for one in canonical.loads(raw)["manifests"] if isinstance(one, dict)]
    return [one for one in found if one.get("artifactType") in (SIGNATURE, REPORT)]


def _fallback_tag(digest: str) -> str:
    return digest.replace(":", "-")


def _check(content: bytes, digest: str) -> None:
    if digest != f"sha256:{hashlib.sha256(content).hexdigest()}":
        raise ShippingError(
            f"The registry gave other bytes than {digest[:24]}.", "Don't trust it; pull again."
        )


def _check_digest(digest: str) -> None:
    if not _DIGEST.fullmatch(digest):
        raise ShippingError(
            f"The registry names {digest[:80]!r}, which is no SHA-256 digest.", "Don't trust it."
        )
