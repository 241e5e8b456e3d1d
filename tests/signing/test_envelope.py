"""Statements that somebody signed, and what passes for one."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from patcher.errors import TrustError, UsageError
from patcher.signing import enveloped, generate, opened

STATEMENT = {
    "_type": "https://in-toto.io/Statement/v1",
    "subject": [{"name": "p.st", "digest": {"sha256": "ab" * 32}}],
    "predicateType": "urn:patcher:removal:v1",
    "predicate": {"n": 1},
}


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path, str]:
    return generate(tmp_path / "me", b"secret")


def test_what_was_signed_comes_back(keys: tuple[Path, Path, str]) -> None:
    envelope = enveloped(STATEMENT, keys[0], b"secret")
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert envelope["signatures"][0]["keyid"] == keys[2]
    assert opened(json.dumps(envelope).encode(), keys[1]) == STATEMENT


def test_others_check_it_by_the_specification_alone(keys: tuple[Path, Path, str]) -> None:
    envelope = enveloped(STATEMENT, keys[0], b"secret")
    kind, payload = envelope["payloadType"].encode(), base64.b64decode(envelope["payload"])
    signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    public = serialization.load_pem_public_key(keys[1].read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    public.verify(signature, signed, ec.ECDSA(hashes.SHA256()))


def test_somebody_else_signed(keys: tuple[Path, Path, str], tmp_path: Path) -> None:
    other = generate(tmp_path / "other")
    envelope = enveloped(STATEMENT, other[0])
    envelope["signatures"][0]["keyid"] = keys[2]
    with pytest.raises(TrustError, match="did not sign"):
        opened(json.dumps(envelope).encode(), keys[1])


def test_a_word_of_the_statement_is_changed(keys: tuple[Path, Path, str]) -> None:
    envelope = enveloped(STATEMENT, keys[0], b"secret")
    changed = json.dumps({**STATEMENT, "predicate": {"n": 2}}).encode()
    envelope["payload"] = base64.b64encode(changed).decode()
    with pytest.raises(TrustError, match="did not sign"):
        opened(json.dumps(envelope).encode(), keys[1])


@pytest.mark.parametrize("data", [
    b"", b"{}", b"[]", b"[" * 9000, b'{"payload": "", "payloadType": "", "signatures": []}',
    json.dumps(STATEMENT).encode(), b"\xff", b"x" * (17 << 20),
])  # fmt: skip
def test_it_is_no_envelope(keys: tuple[Path, Path, str], data: bytes) -> None:
    with pytest.raises(TrustError, match="no signed statement"):
        opened(data, keys[1])


def test_another_kind_of_payload_is_signed(keys: tuple[Path, Path, str]) -> None:
    wrong: dict[str, Any] = {**STATEMENT, "_type": "https://in-toto.io/Statement/v0.1"}
    with pytest.raises(TrustError, match="did not sign"):
        opened(json.dumps(enveloped(wrong, keys[0], b"secret")).encode(), keys[1])


def test_a_wrong_password(keys: tuple[Path, Path, str]) -> None:
    with pytest.raises(UsageError, match="Can't sign"):
        enveloped(STATEMENT, keys[0], b"wrong")
    with pytest.raises(UsageError, match="Can't sign"):
        enveloped(STATEMENT, keys[1])
