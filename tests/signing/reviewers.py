"""Keys, certificates and policies of people who review patches."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from patcher.patch import Patch
from patcher.signing import Identity, generate, sign


class Reviewers:
    """Three people with keys in one folder, and what they sign."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = {name: generate(folder / name) for name in ("alice", "bob", "carol")}

    def bundle(self, name: str, patch: Patch) -> bytes:
        """The signature that somebody puts on a patch."""
        out = self.folder / "patch.st.sig"
        sign(patch.data, out, Identity(self.keys[name][0]))
        return out.read_bytes()

    def policy(self, head: str = "", *names: str, each: str = "", name: str = "p.toml") -> Path:
        """A policy's file: ``head``, and a signer for each of ``names`` with the lines ``each``."""
        signers = [
            f'[[signer]]\nname = "{one}"\npublic-key = "{self.keys[one][1].name}"\n{each}'
            for one in names
        ]
        path = self.folder / name
        path.write_text("\n".join([head, *signers]))
        return path


class Authority:
    """A certificate authority, and the certificates that it gave out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.root = folder / "root.pem"
        self._root = self._made("root", self._key, ca=True)
        self.root.write_bytes(self._root.public_bytes(serialization.Encoding.PEM))

    def _made(
        self, name: str, key: ec.EllipticCurvePrivateKey, *, ca: bool = False
    ) -> x509.Certificate:
        def named(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "crl_sign", "encipher_only", "decipher_only"), False,
        )  # fmt: skip
        day = timedelta(days=1)
        return (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named("root"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - day)
            .not_valid_after(datetime.now(UTC) + day)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, **usage), critical=True
            )
            .sign(self._key, hashes.SHA256())
        )

    def identity(self, name: str) -> Identity:
        """Somebody with a key and a certificate of this authority."""
        key = ec.generate_private_key(ec.SECP256R1())
        private, certificate = self.folder / f"{name}.key", self.folder / f"{name}.crt"
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        pem = self._made(name, key).public_bytes(serialization.Encoding.PEM)
        certificate.write_bytes(pem)
        return Identity(private, None, certificate)


def changed(bundle: bytes, **envelope: object) -> bytes:
    """A bundle with fields of its envelope changed."""
    document = json.loads(bundle)
    document["dsseEnvelope"] |= envelope
    return json.dumps(document).encode()
