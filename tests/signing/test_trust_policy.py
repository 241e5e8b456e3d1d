"""What a trust policy admits, and which rule refuses what somebody tried."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from patcher.errors import TrustError, UsageError
from patcher.patch import Patch
from patcher.signing import Identity, TrustPolicy, bundle_subject, generate, sign
from patcher.signing.bundles import signing_key
from tests.signing.reviewers import Authority, Reviewers, changed
from tests.small_patch import small_patch

TWO = "signatures = 2"


def claiming(patch_id: str, more: str = "") -> bytes:
    """What says that it is a bundle of a patch, and no more."""
    resources = [{"name": ".", "algorithm": "sha256", "digest": patch_id}]
    payload = base64.b64encode(json.dumps({"predicate": {"resources": resources}}).encode())
    return f'{{"dsseEnvelope":{{"payload":"{payload.decode()}"}}{more}}}'.encode()


def test_a_claim_is_no_signature(people: Reviewers, patch: Patch) -> None:
    assert bundle_subject(claiming(patch.id)) == patch.id
    assert rule(people.policy("", "alice"), patch, claiming(patch.id)) == "signatures"


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Reviewers:
    return Reviewers(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def patch() -> Patch:
    return small_patch()


@pytest.fixture(scope="module")
def signed(people: Reviewers, patch: Patch) -> dict[str, bytes]:
    return {name: people.bundle(name, patch) for name in people.keys}


def refused(policy: Path, patch: Patch, *given: bytes, at: datetime | None = None) -> TrustError:
    with pytest.raises(TrustError) as caught:
        TrustPolicy.read(policy).check(patch, given, at)
    assert caught.value.cure
    return caught.value


def rule(policy: Path, patch: Patch, *given: bytes, at: datetime | None = None) -> object:
    return refused(policy, patch, *given, at=at).details["rule"]


def test_two_of_three_reviewers(people: Reviewers, patch: Patch, signed: dict[str, bytes]) -> None:
    policy = TrustPolicy.read(people.policy(TWO, "alice", "bob", "carol"))
    assert policy.check(patch, [signed["carol"], signed["alice"]]) == ["carol", "alice"]
    assert policy.check(patch, list(signed.values())) == ["alice", "bob", "carol"]


def test_a_bundle_says_which_patch_it_is_for(patch: Patch, signed: dict[str, bytes]) -> None:
    assert {bundle_subject(bundle) for bundle in signed.values()} == {patch.id}


def test_one_reviewer_signs_twice(people: Reviewers, patch: Patch) -> None:
    twice = [people.bundle("alice", patch), people.bundle("alice", patch)]
    assert twice[0] != twice[1]  # the signature is randomised
    error = refused(people.policy(TWO, "alice", "bob"), patch, *twice)
    assert "1 of 2" in error.message
    assert error.details["rule"] == "signatures"


def test_nobody_signed(people: Reviewers, patch: Patch) -> None:
    assert rule(people.policy("", "alice"), patch) == "unsigned"


def test_unsigned_is_taken_where_the_policy_says_so(
    people: Reviewers, patch: Patch, signed: dict[str, bytes]
) -> None:
    policy = people.policy("unsigned = true", "alice")
    assert TrustPolicy.read(policy).check(patch, []) == []
    assert TrustPolicy.read(policy).check(patch, [signed["alice"]]) == ["alice"]
    assert TrustPolicy.read(policy).check(patch, [signed["bob"]]) == [], "no worse than none"


def test_a_stranger_signs(people: Reviewers, patch: Patch, signed: dict[str, bytes]) -> None:
    assert rule(people.policy("", "alice"), patch, signed["bob"], signed["carol"]) == "signatures"


def test_the_signature_is_of_another_patch(people: Reviewers, patch: Patch) -> None:
    other = people.bundle("alice", small_patch(1))
    assert rule(people.policy("", "alice"), patch, other) == "signatures"


def test_the_signed_text_is_exchanged(people: Reviewers, patch: Patch) -> None:
    """The payload names this patch, the signature is over another one's."""
    ours = json.loads(people.bundle("bob", patch))["dsseEnvelope"]["payload"]
    forged = changed(people.bundle("alice", small_patch(1)), payload=ours)
    assert bundle_subject(forged) == patch.id
    assert rule(people.policy("", "alice"), patch, forged) == "signatures"


def test_the_key_in_the_bundle_is_renamed(
    people: Reviewers, patch: Patch, signed: dict[str, bytes]
) -> None:
    hint = people.keys["alice"][2]
    forged = signed["bob"].replace(people.keys["bob"][2].encode(), hint.encode())
    assert forged != signed["bob"]
    assert rule(people.policy("", "alice"), patch, forged) == "signatures"


def test_a_key_is_revoked(people: Reviewers, patch: Patch, signed: dict[str, bytes]) -> None:
    head = f'revoked-keys = ["{people.keys["alice"][2]}"]'
    assert rule(people.policy(head, "alice", "bob"), patch, signed["alice"]) == "revoked-keys"
    policy = TrustPolicy.read(people.policy(head, "alice", "bob"))
    assert policy.check(patch, list(signed.values())) == ["bob"]


def test_the_patch_is_revoked(people: Reviewers, patch: Patch, signed: dict[str, bytes]) -> None:
    head = f'unsigned = true\nrevoked-patches = ["{patch.id}"]'
    assert rule(people.policy(head, "alice"), patch, signed["alice"]) == "revoked-patches"
    assert rule(people.policy(head, "alice"), patch) == "revoked-patches"


def test_a_reviewer_left(people: Reviewers, patch: Patch, signed: dict[str, bytes]) -> None:
    policy = people.policy("", "alice", each="not-after = 2026-12-01T00:00:00Z\n")
    before, after = datetime(2026, 11, 30, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)
    assert TrustPolicy.read(policy).check(patch, [signed["alice"]], before) == ["alice"]
    assert rule(policy, patch, signed["alice"], at=after) == "not-after"


def test_a_reviewer_signs_for_a_model_of_others(
    people: Reviewers, patch: Patch, signed: dict[str, bytes]
) -> None:
    for_others = people.policy("", "alice", each='models = ["Qwen/*", "Test"]\n')
    assert rule(for_others, patch, signed["alice"]) == "models"
    for_it = people.policy("", "alice", each='models = ["Qwen/*", "te?t"]\n')
    assert TrustPolicy.read(for_it).check(patch, [signed["alice"]]) == ["alice"]


def test_a_model_signature_over_many_files_is_none_of_a_patch(
    people: Reviewers, patch: Patch, tmp_path: Path
) -> None:
    import model_signing

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "patch").write_bytes(patch.data)
    (folder / "more").write_bytes(b"x")
    key = people.keys["alice"][0]
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=key)
    config.sign(folder, tmp_path / "s")
    bundle = (tmp_path / "s").read_bytes()
    assert bundle_subject(bundle) is None
    assert rule(people.policy("", "alice"), patch, bundle) == "signatures"


def test_the_key_file_is_exchanged_after_the_policy_was_read(
    people: Reviewers, patch: Patch, tmp_path: Path
) -> None:
    mallory = generate(tmp_path / "mallory")
    policy = tmp_path / "p.toml"
    policy.write_text('[[signer]]\nname = "alice"\npublic-key = "alice.pub"\n')
    (tmp_path / "alice.pub").write_bytes(people.keys["alice"][1].read_bytes())
    read = TrustPolicy.read(policy)
    (tmp_path / "alice.pub").write_bytes(mallory[1].read_bytes())
    sign(patch.data, tmp_path / "p.st.sig", Identity(mallory[0]))
    with pytest.raises(TrustError):
        read.check(patch, [(tmp_path / "p.st.sig").read_bytes()])


@pytest.mark.parametrize("garbage", [
    b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 9000, b'{"dsseEnvelope": 1}',
    b'{"dsseEnvelope": {"payload": "!!"}}', b"x" * (1 << 20),
    json.dumps({"dsseEnvelope": {"payload": base64.b64encode(b"[1]").decode()}}).encode(),
    claiming(small_patch().id, ',"x":1e999'), claiming(small_patch().id, r',"x":"\ud800"'),
])  # fmt: skip
def test_garbage_is_sent_as_a_signature(people: Reviewers, patch: Patch, garbage: bytes) -> None:
    assert bundle_subject(garbage) is None
    assert rule(people.policy("", "alice"), patch, garbage) == "signatures"


# -- certificates --------------------------------------------------------------------------------


def test_certificates(patch: Patch, tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    (tmp_path / "other").mkdir()
    others = Authority(tmp_path / "other")

    def bundle(identity: Identity) -> bytes:
        sign(patch.data, tmp_path / "out", identity)
        return (tmp_path / "out").read_bytes()

    policy = tmp_path / "p.toml"
    policy.write_text('[[signer]]\nname = "release"\ncertificates = ["root.pem"]\n')
    alice = bundle(ours.identity("alice"))
    assert TrustPolicy.read(policy).check(patch, [alice]) == ["release"]
    assert rule(policy, patch, bundle(others.identity("alice"))) == "signatures"
    policy.write_text(policy.read_text() + 'common-name = "bob"\n')
    assert rule(policy, patch, alice) == "signatures", "another name under the same root"
    assert TrustPolicy.read(policy).check(patch, [bundle(ours.identity("bob"))]) == ["release"]


def certified(patch: Patch, identity: Identity, folder: Path) -> bytes:
    sign(patch.data, folder / "out", identity)
    return (folder / "out").read_bytes()


def test_the_key_of_a_certificate_is_revoked(patch: Patch, tmp_path: Path) -> None:
    bundle = certified(patch, Authority(tmp_path).identity("alice"), tmp_path)
    policy = tmp_path / "p.toml"
    signer = '[[signer]]\nname = "release"\ncertificates = ["root.pem"]\n'
    policy.write_text(signer)
    assert TrustPolicy.read(policy).check(patch, [bundle]) == ["release"]
    policy.write_text(f'revoked-keys = ["{signing_key(bundle)}"]\n{signer}')
    assert rule(policy, patch, bundle) == "revoked-keys"


def test_one_key_signs_bare_and_with_its_certificate(patch: Patch, tmp_path: Path) -> None:
    """One person, who would pass for two reviewers."""
    identity = Authority(tmp_path).identity("alice")
    assert identity.key is not None
    key = serialization.load_pem_private_key(identity.key.read_bytes(), None)
    (tmp_path / "alice.pub").write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    two = [certified(patch, one, tmp_path) for one in (identity, Identity(identity.key))]
    policy = tmp_path / "p.toml"
    policy.write_text(
        'signatures = 2\n[[signer]]\nname = "alice"\npublic-key = "alice.pub"\n'
        '[[signer]]\nname = "release"\ncertificates = ["root.pem"]\n'
    )
    assert "1 of 2" in refused(policy, patch, *two).message


def test_a_certificate_is_of_a_version_that_does_not_exist(patch: Patch, tmp_path: Path) -> None:
    bundle = json.loads(certified(patch, Authority(tmp_path).identity("alice"), tmp_path))
    (held,) = bundle["verificationMaterial"]["x509CertificateChain"]["certificates"][:1]
    raw = bytearray(base64.b64decode(held["rawBytes"]))
    raw[raw.find(b"\xa0\x03\x02\x01\x02") + 4] = 5
    held["rawBytes"] = base64.b64encode(bytes(raw)).decode()
    policy = tmp_path / "p.toml"
    policy.write_text(
        '[[signer]]\nname = "r"\ncertificates = ["root.pem"]\ncommon-name = "alice"\n'
    )
    assert rule(policy, patch, json.dumps(bundle).encode()) == "signatures"


# -- policies that are none ------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "why"), [
    ("signatures = 0", "greater than or equal to 1"),
    ("signatures = 3", "3 signatures of 0"),
    ("signatres = 1", "Extra inputs"),
    ("= 1", "Invalid"),
    ('revoked-patches = ["3fa9"]', "revoked-patches"),
    ('[[signer]]\nname = "a"', "one of public-key"),
    ('[[signer]]\nname = "a b"\npublic-key = "alice.pub"', "name"),
    ('[[signer]]\nname = "a"\nidentity = "me@example.org"', "issuer together"),
    ('[[signer]]\nname = "a"\npublic-key = "alice.pub"\nnot-after = 2026-12-01T00:00:00',
     "timezone"),
    ('[[signer]]\nname = "a"\npublic-key = "alice.pub"\n' * 2, "names a signer twice"),
    ('[[signer]]\nname = "a"\npublic-key = "alice.pub"\n'
     '[[signer]]\nname = "b"\npublic-key = "alice.pub"', "the same key"),
    ('[[signer]]\nname = "a"\npublic-key = "alice.key"', "no public key"),
    ('[[signer]]\nname = "a"\npublic-key = "nobody.pub"', "no public key"),
    ('[[signer]]\nname = "a"\ncertificates = ["alice.pub"]', "can't be checked"),
])  # fmt: skip
def test_a_policy_is_written_wrongly(people: Reviewers, text: str, why: str) -> None:
    path = people.folder / "wrong.toml"
    path.write_text(text)
    with pytest.raises(TrustError, match=why):
        TrustPolicy.read(path)


def test_a_policy_that_asks_nobody_for_anything(people: Reviewers, patch: Patch) -> None:
    path = people.policy(f'unsigned = true\nrevoked-patches = ["{"0" * 64}"]')
    assert TrustPolicy.read(path).check(patch, []) == []


def test_a_policy_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="no trust policy"):
        TrustPolicy.read(tmp_path / "none.toml")


# -- keys ----------------------------------------------------------------------------------------


def test_keys_are_for_their_owner_and_never_written_over(tmp_path: Path) -> None:
    private, public, fingerprint = generate(tmp_path / "me", b"secret")
    assert private.stat().st_mode & 0o777 == 0o600
    assert b"ENCRYPTED" in private.read_bytes()
    assert len(fingerprint) == 64
    before = private.read_bytes()
    with pytest.raises(UsageError, match="there already"):
        generate(tmp_path / "me")
    assert private.read_bytes() == before
    data = small_patch().data
    with pytest.raises(UsageError, match="Can't sign"):
        sign(data, tmp_path / "s", Identity(private, b"wrong"))
    with pytest.raises(UsageError, match="Can't sign"):
        sign(data, tmp_path / "s", Identity(public))
    assert not (tmp_path / "s").exists()
    sign(data, tmp_path / "s", Identity(private, b"secret"))
    assert TrustPolicy.of_key(public).check(small_patch(), [(tmp_path / "s").read_bytes()])
