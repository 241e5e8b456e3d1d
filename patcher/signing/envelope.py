"""In-toto statements in DSSE envelopes: what certificates and ledger heads are signed as.

https://github.com/secure-systems-lab/dsse, by ``securesystemslib``; any tool that reads DSSE checks
them. The signature's key id is the fingerprint that a trust policy names a key by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TrustError, UsageError
from ..patch import canonical
from ..protocol import STATEMENT
from .keys import fingerprint, needed

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_ENVELOPE_BYTES = 16 << 20


def enveloped(
    statement: Mapping[str, Any], key: Path, password: bytes | None = None
) -> dict[str, Any]:
    """The statement in an envelope, signed with the private key in ``key``.

    Raises:
        UsageError: a key that can't be read, a wrong password, a package isn't installed.
    """
    signers = needed("securesystemslib.signer")
    serialization = needed("cryptography.hazmat.primitives.serialization")
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), password)
        keyid = fingerprint(private.public_key())
        public = signers.SSlibKey.from_crypto(private.public_key(), keyid=keyid)
        signer = signers.CryptoSigner(private, public)
    except (OSError, ValueError, TypeError, TrustError) as error:
        raise UsageError(
            f"Can't sign with {key}: {error}.",
            "Give an elliptic curve key in PEM, and its password with --password-file.",
        ) from None
    envelope = needed("securesystemslib.dsse").Envelope(_bytes(statement), PAYLOAD_TYPE, {})
    envelope.sign(signer)
    document: dict[str, Any] = envelope.to_dict()
    return document


def opened(data: bytes, public_key: Path) -> dict[str, Any]:
    """The statement in an envelope that the owner of ``public_key`` signed.

    Raises:
        TrustError: it is no envelope of a statement, or isn't signed by that key.
        UsageError: a package isn't installed.
    """
    signers = needed("securesystemslib.signer")
    serialization = needed("cryptography.hazmat.primitives.serialization")
    keyid = fingerprint(public_key)
    public = serialization.load_pem_public_key(public_key.read_bytes())
    try:
        if len(data) > MAX_ENVELOPE_BYTES:
            raise ValueError("too large")
        envelope = needed("securesystemslib.dsse").Envelope.from_dict(canonical.loads(data))
        statement: dict[str, Any] = canonical.loads(envelope.payload)
        whole = envelope.payload_type == PAYLOAD_TYPE and statement["_type"] == STATEMENT
    except Exception as error:  # securesystemslib's own, and what odd JSON makes it raise
        raise TrustError(
            f"That is no signed statement ({type(error).__name__}).",
            "Give a file that `patcher certificate --key` made.",
        ) from None
    try:
        if not whole:
            raise ValueError("not an in-toto statement")
        envelope.verify([signers.SSlibKey.from_crypto(public, keyid=keyid)], 1)
    except Exception:
        raise TrustError(
            f"{public_key} did not sign that statement.", "Ask who made it for their public key."
        ) from None
    return statement


def _bytes(statement: Mapping[str, Any]) -> bytes:
    return json.dumps(statement, indent=2, allow_nan=False).encode()
