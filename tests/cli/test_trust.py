"""``keygen``, ``sign``, ``verify-file``, and the signatures that ``apply`` sends."""

from __future__ import annotations

from pathlib import Path

import pytest

from patcher.patch import Patch
from patcher.signing import bundle_subject
from tests.cli.running import document, run, run_on
from tests.fake_engine import FakeEngine
from tests.small_patch import small_patch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small_patch().write(tmp_path / "p.st")
    return tmp_path


def keygen(*names: str) -> None:
    for name in names:
        assert run("keygen", name).exit_code == 0


def test_two_people_sign_and_anybody_can_check(folder: Path) -> None:
    keygen("alice", "bob")
    signed = document(run("sign", "p.st", "--key", "alice.key", "--json"))
    assert signed == {
        "signed": [{"id": small_patch().id, "path": "p.st", "signature": "p.st.alice.sig"}]
    }
    assert run("sign", "p.st", "--key", "bob.key").exit_code == 0
    alone = document(run("verify-file", "p.st", "--public-key", "bob.pub", "--json"))
    assert alone == {
        "id": small_patch().id,
        "path": "p.st",
        "ok": True,
        "signers": ["bob"],
        "signatures": 2,
    }
    signers = "".join(f'[[signer]]\nname="{n}"\npublic-key="{n}.pub"\n' for n in ("alice", "bob"))
    (folder / "policy.toml").write_text(f"signatures = 2\n{signers}")
    both = run("verify-file", "p.st", "--trust", "policy.toml")
    assert both.exit_code == 0
    assert "alice, bob" in both.stdout
    (folder / "p.st.bob.sig").rename(folder / "elsewhere")
    one = run("verify-file", "p.st", "--trust", "policy.toml", "--json")
    assert one.exit_code == 5
    assert document(one)["error"]["rule"] == "signatures"
    again = run("verify-file", "p.st", "--trust", "policy.toml", "--signature", "elsewhere")
    assert again.exit_code == 0


def test_a_bit_of_the_file_is_changed_after_it_was_signed(folder: Path) -> None:
    keygen("alice")
    run("sign", "p.st", "--key", "alice.key")
    (folder / "p.st").write_bytes(small_patch(1).data)
    refused = run("verify-file", "p.st", "--public-key", "alice.pub", "--json")
    assert refused.exit_code == 5
    assert document(refused)["error"]["rule"] == "unsigned"
    named = run("verify-file", "p.st", "--public-key", "alice.pub", "--signature", "p.st.alice.sig")
    assert named.exit_code == 2
    assert "none of the patches" in named.stderr


def test_what_was_checked_is_signed_through_a_link_and_whatever_becomes_of_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keygen("alice")
    (folder / "link.st").symlink_to("p.st")
    signed = run("sign", "link.st", "--key", "alice.key")
    assert signed.exit_code == 0, signed.output
    assert run("verify-file", "link.st", "--public-key", "alice.pub").exit_code == 0
    read = Patch.read

    def read_once(path: Path) -> Patch:
        patch = read(path)
        path.write_bytes(small_patch(1).data)
        return patch

    with monkeypatch.context() as patched:
        patched.setattr(Patch, "read", read_once)
        assert run("sign", "p.st", "--key", "alice.key", "-o", "out").exit_code == 0
    assert bundle_subject((folder / "out").read_bytes()) == small_patch().id


def test_a_damaged_file_is_not_signed(folder: Path) -> None:
    keygen("alice")
    (folder / "p.st").write_bytes(small_patch().data[:-1])
    assert run("sign", "p.st", "--key", "alice.key").exit_code == 3
    assert not list(folder.glob("*.sig"))


@pytest.mark.parametrize("words", [
    ("sign", "p.st"),
    ("sign", "p.st", "--key", "alice.key", "--keyless"),
    ("sign", "p.st", "p.st", "--key", "alice.key", "-o", "x"),
    ("sign", "p.st", "--key", "alice.pub"),
    ("sign", "p.st", "--key", "alice.key", "--password-file", "empty"),
    ("sign", "p.st", "--key", "alice.key", "-o", "no/such/folder/x"),
    ("sign", "p.st", "--key", "alice.key", "-o", "p.st"),
    ("sign", "p.st", "--key", "alice.key", "-o", "link"),
    ("sign", "p.st", "--key", "alice.key", "-o", "alice.key"),
    ("keygen", "alice"),
    ("keygen", "."),
    ("keygen", ".."),
    ("keygen", "/"),
    ("verify-file", "p.st"),
    ("verify-file", "p.st", "--public-key", "alice.pub", "--signature", "empty"),
    ("apply", "p.st", "--signature", "empty"),
])  # fmt: skip
def test_words_that_are_off(folder: Path, fake: FakeEngine, words: tuple[str, ...]) -> None:
    keygen("alice")
    (folder / "empty").touch()
    (folder / "link").symlink_to("p.st")
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    result = run_on(fake, *words, "--json")
    assert result.exit_code == 2
    assert document(result)["error"]["cure"]
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == before
    assert not fake.requests, "nothing was sent"


def test_a_password_is_asked_for_by_a_file(folder: Path) -> None:
    (folder / "password").write_text("correct horse\n")
    words = ("--password-file", "password")
    assert run("keygen", "alice", *words).exit_code == 0
    assert run("sign", "p.st", "--key", "alice.key").exit_code == 2
    assert run("sign", "p.st", "--key", "alice.key", *words).exit_code == 0


def test_apply_sends_the_signatures_that_lie_beside_the_file(
    folder: Path, fake: FakeEngine
) -> None:
    keygen("alice", "bob")
    run("sign", "p.st", "--key", "alice.key")
    run("sign", "p.st", "--key", "bob.key", "-o", "elsewhere")
    (folder / "p.st.note.sig").write_text("not a signature")
    assert run_on(fake, "apply", "p.st", "--signature", "elsewhere").exit_code == 0
    sent = [(folder / name).read_bytes() for name in ("p.st.alice.sig", "elsewhere")]
    assert fake.signatures == [(small_patch().id, bundle) for bundle in sent]
