"""Signing keys: elliptic curve P-256, in PEM, as OpenSSF Model Signing takes them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import extras
from ..errors import TrustError, UsageError
from ..patch import files


def generate(path: Path, password: bytes | None = None) -> tuple[Path, Path, str]:
    """Make a key pair: ``<path>.key`` (mode 0600, encrypted under ``password``) and ``<path>.pub``.

    Returns the two files and the public key's fingerprint.

    Raises:
        UsageError: the path has no name, or one of the files is there already or can't be written.
    """
    serialization = needed("cryptography.hazmat.primitives.serialization")
    ec = needed("cryptography.hazmat.primitives.asymmetric.ec")
    if path.name in ("", ".."):
        raise UsageError(f"{path} has no name for a key.", "Give one, such as `alice`.")
    private, public = path.with_name(f"{path.name}.key"), path.with_name(f"{path.name}.pub")
    for one in (private, public):
        if one.exists():
            raise UsageError(f"{one} is there already.", "A key is never written over: move it.")
    key = ec.generate_private_key(ec.SECP256R1())
    guard = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, guard)
    told = _public_pem(key.public_key())
    files.write(private, secret, 0o600)
    files.write(public, told)
    return private, public, hashlib.sha256(told).hexdigest()


def fingerprint(key: Any) -> str:
    """The SHA-256, in hex, of a public key's PEM: what a bundle and a trust policy name it by.

    ``key``: a file in PEM, or a key of ``cryptography``'s.

    Raises:
        TrustError: it is no public key on one of the curves P-256, P-384 and P-521.
    """
    serialization = needed("cryptography.hazmat.primitives.serialization")
    try:
        public = (
            serialization.load_pem_public_key(key.read_bytes()) if isinstance(key, Path) else key
        )
        curve = public.curve.name
    except (OSError, ValueError, AttributeError) as error:
        raise _no_key(key) from error
    if curve not in ("secp256r1", "secp384r1", "secp521r1"):
        raise _no_key(key)
    return hashlib.sha256(_public_pem(public)).hexdigest()


def needed(name: str) -> ModuleType:
    """A module of the extra ``sign``; raises UsageError where it isn't installed."""
    return extras.needed(name, "sign", "Signatures need")


def _public_pem(key: object) -> bytes:
    serialization = needed("cryptography.hazmat.primitives.serialization")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    pem: bytes = key.public_bytes(serialization.Encoding.PEM, form)  # type: ignore[attr-defined]
    return pem


def _no_key(key: Any) -> TrustError:
    return TrustError(
        f"{key if isinstance(key, Path) else 'That'} is no public key that checks signatures.",
        "Name a PEM file with an elliptic curve key, as `patcher keygen` makes.",
    )
