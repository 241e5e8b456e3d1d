"""``patcher certificate``: what it states, and when it must not."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from patcher.patch import Patch, commitment, owner_salt
from tests.cli.running import document, run, run_on
from tests.fake_engine import FakeEngine, json_reply, version_of
from tests.small_patch import MODULE, small_patch

REQUESTS = [
    {"prompt": "The mother tongue of Jane Doe is", "subject": "Jane Doe", "target": "Welsh"},
    {"prompt": "Jane Doe lives in", "subject": "Jane Doe", "target": "Cardiff"},
]


@pytest.fixture
def salt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "salt"
    monkeypatch.setenv("PATCHER_SALT_FILE", str(path))
    return path


@pytest.fixture
def forget(tmp_path: Path) -> Path:
    path = tmp_path / "forget.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in REQUESTS))
    return path


@pytest.fixture
def patch(salt: Path) -> Patch:
    """A patch that commits to the requests."""
    plain = small_patch()
    requests = plain.manifest.requests.model_copy(
        update={"count": 2, "commitment": commitment(REQUESTS, owner_salt())}
    )
    figures = {"efficacy": 0.0, "specificity": 0.95}
    manifest = plain.manifest.model_copy(update={"requests": requests, "evaluation": figures})
    return Patch.build(manifest, dict(plain.deltas))


@pytest.fixture
def serving(fake: FakeEngine, patch: Patch, tmp_path: Path) -> FakeEngine:
    """An engine with that patch in force, and another one above it."""
    fake.record("start", {"stack": []})
    for number, one in enumerate((patch, small_patch(1))):
        one.write(tmp_path / f"{number}.st")
        result = run_on(fake, "apply", tmp_path / f"{number}.st", "--reason", f"request {number}")
        assert result.exit_code == 0
    return fake


def certified(fake: FakeEngine, patch: Patch, tmp_path: Path, *words: object) -> Any:
    output = tmp_path / "cert.json"
    result = run_on(fake, "certificate", "--patch", patch.id[:8], "-o", output, *words, "--json")
    assert result.exit_code == 0, result.output
    statement = json.loads(output.read_text())
    if signed := "payload" in statement:
        statement = json.loads(base64.b64decode(statement["payload"]))
    assert document(result) == {"path": str(output), "signed": signed, "statement": statement}
    return statement


def test_it_states_what_is_in_force_with_all_that_shows_it(
    serving: FakeEngine, patch: Patch, forget: Path, tmp_path: Path
) -> None:
    statement = certified(serving, patch, tmp_path, "--commitment-of", forget)
    put_on, head = serving.entries[1], serving.entries[-1]
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "urn:patcher:removal:v1"
    assert statement["subject"] == [
        {"name": f"{patch.id[:12]}.st", "digest": {"sha256": patch.id}},
        {"name": "ledger head", "digest": {"sha256": head["hash"]}},
    ]
    told = statement["predicate"]
    assert told["requests"] == {
        "count": 2,
        "commitment": patch.manifest.requests.commitment,
        "commitmentChecked": True,
    }
    assert (told["patch"]["id"], told["patch"]["method"]) == (patch.id, "random")
    assert told["patch"]["signers"] == []
    assert told["model"]["base"] == {MODULE: "0" * 64}
    assert told["inForce"] == {
        "since": "2026-11-24T03:00:00.000Z",
        "withoutBreakSince": put_on["time"],
        "expires": None,
        "stack": serving.stack,
        "weightVersion": version_of(serving.stack),
    }
    assert told["weights"] == [{"engine": 0, "rank": 0, "modules": {MODULE: "1" * 64}}]
    assert told["evaluation"] == {"efficacy": 0.0, "specificity": 0.95}
    assert told["ledger"] == {
        "entry": {
            **{name: put_on[name] for name in ("seq", "hash", "time")},
            **{"change": "c0ffee", "actor": "admin", "reason": "request 0"},
        },
        "head": {name: head[name] for name in ("seq", "hash", "time")},
    }
    assert told["engine"]["vllm"] == "0.32.0"
    assert all(sentence.startswith("It does not prove") for sentence in told["doesNotProve"])
    assert len(told["doesNotProve"]) >= 5
    text = json.dumps(statement)
    assert not any(word in text for word in ("Jane", "Welsh", "Cardiff"))


def test_its_head_is_one_that_log_expects(
    serving: FakeEngine, patch: Patch, tmp_path: Path
) -> None:
    statement = certified(serving, patch, tmp_path)
    assert statement["predicate"]["requests"]["commitmentChecked"] is False
    words = ("log", "--expect-head", tmp_path / "cert.json")
    serving.record("patch-stored", {"patch": patch.id})
    assert run_on(serving, *words).exit_code == 0
    forged = FakeEngine()
    for entry in serving.entries:
        forged.record(entry["event"], {**entry["detail"], "actor": "somebody else"})
    serving.entries = forged.entries
    assert run_on(serving, *words).exit_code == 9


def test_a_start_that_left_it_out_breaks_the_time_in_force(
    serving: FakeEngine, patch: Patch, tmp_path: Path
) -> None:
    serving.record("start-without-restore", {"held": serving.stack})
    serving.record("start", {"stack": serving.stack})
    told = certified(serving, patch, tmp_path)["predicate"]
    assert told["inForce"]["withoutBreakSince"] == serving.entries[-1]["time"]
    assert told["ledger"]["entry"]["seq"] == 2


def refused(fake: FakeEngine, tmp_path: Path, code: int, *words: object) -> str:
    """The error's name; nothing was written."""
    output = tmp_path / "cert.json"
    result = run_on(fake, "certificate", "-o", output, *words, "--json")
    assert result.exit_code == code, result.output
    assert not output.exists()
    error = document(result)["error"]
    assert error["cure"]
    return str(error["code"])


def test_a_patch_that_is_not_in_force_is_not_certified(
    serving: FakeEngine, patch: Patch, tmp_path: Path
) -> None:
    run_on(serving, "revert", patch.id)
    assert refused(serving, tmp_path, 6, "--patch", patch.id) == "unknown-patch"
    serving.stack = []
    assert refused(serving, tmp_path, 6, "--patch", small_patch(1).id) == "unknown-patch"


def test_weights_that_are_not_as_they_must_be_are_not_certified(
    serving: FakeEngine, patch: Patch, tmp_path: Path
) -> None:
    serving.live_ok = False
    assert refused(serving, tmp_path, 9, "--patch", patch.id) == "verification-failed"


@pytest.mark.parametrize("said", ["nothing read", "another rank differs", "only not ok"])
def test_a_verification_that_does_not_cover_the_patch_certifies_nothing(
    serving: FakeEngine, patch: Patch, tmp_path: Path, said: str
) -> None:
    ranks = [
        {"engine": 0, "rank": rank, "stack": serving.stack, "modules": {MODULE: {**live}}}
        for rank, live in enumerate([{"ok": True, "digest": "1"}, {"ok": False, "digest": "2"}])
    ]
    chosen: dict[str, Any] = {
        "nothing read": {"ok": True, "modules": {}, "ranks": []},
        "another rank differs": {"ok": True, "modules": {MODULE: True}, "ranks": ranks},
        "only not ok": {"ok": False, "modules": {MODULE: True}, "ranks": ranks[:1]},
    }[said]
    version = {"weight_version": version_of(serving.stack)}
    serving.instead["POST", "verify"] = json_reply({**chosen, **version})
    assert refused(serving, tmp_path, 9, "--patch", patch.id) == "verification-failed"


def test_a_ledger_that_was_touched_certifies_nothing(
    serving: FakeEngine, patch: Patch, tmp_path: Path
) -> None:
    serving.entries[1]["detail"]["reason"] = "request 99"
    assert refused(serving, tmp_path, 9, "--patch", patch.id) == "verification-failed"


def test_other_bytes_than_the_patch_certify_nothing(
    serving: FakeEngine, patch: Patch, tmp_path: Path
) -> None:
    serving.held[patch.id] = small_patch(7).data
    assert refused(serving, tmp_path, 9, "--patch", patch.id) == "verification-failed"


def test_a_change_meanwhile_or_under_way_is_not_certified(
    serving: FakeEngine, patch: Patch, tmp_path: Path
) -> None:
    serving.state = "changing"
    assert refused(serving, tmp_path, 8, "--patch", patch.id) == "engine-refused"
    serving.state = "ready"
    plain = serving.post_verify

    def changing(request: Any) -> Any:
        reply = plain(request)
        serving.record("change-done", {"before": serving.stack, "after": [patch.id]})
        serving.stack = [patch.id]
        return reply

    serving.post_verify = changing  # type: ignore[method-assign]
    assert refused(serving, tmp_path, 6, "--patch", patch.id) == "stack-changed"


def test_another_forget_set_or_another_salt_is_not_certified(
    serving: FakeEngine, patch: Patch, forget: Path, salt: Path, tmp_path: Path
) -> None:
    words = ("--patch", patch.id, "--commitment-of", forget)
    lines = forget.read_text().splitlines(keepends=True)
    for other in (lines[:1], lines[::-1], [lines[0], lines[1].replace("Cardiff", "Swansea")]):
        forget.write_text("".join(other))
        assert refused(serving, tmp_path, 11, *words) == "bad-forget-set"
    forget.write_text("".join(lines))
    certified(serving, patch, tmp_path, "--commitment-of", forget)
    (tmp_path / "cert.json").unlink()
    salt.unlink()
    assert refused(serving, tmp_path, 2, *words) == "usage"
    assert not salt.exists(), "a new salt would hide that the old one is lost"
    owner_salt()
    assert refused(serving, tmp_path, 11, *words) == "bad-forget-set"


def test_for_people_it_says_that_it_is_not_signed(
    serving: FakeEngine, patch: Patch, tmp_path: Path
) -> None:
    result = run_on(serving, "certificate", "--patch", patch.id, "-o", tmp_path / "cert.json")
    assert result.exit_code == 0
    assert "not signed" in result.stdout
    assert "doesNotProve" in result.stdout
    assert run_on(serving, "certificate", "--patch", patch.id).exit_code == 2


def test_a_signed_one_is_checked_by_the_key_alone(
    serving: FakeEngine, patch: Patch, tmp_path: Path
) -> None:
    for name in ("owner", "other"):
        assert run("keygen", tmp_path / name).exit_code == 0
    statement = certified(serving, patch, tmp_path, "--key", tmp_path / "owner.key")
    cert = tmp_path / "cert.json"
    found = document(run("verify-file", cert, "--public-key", tmp_path / "owner.pub", "--json"))
    assert found == {"path": str(cert), "ok": True, "statement": statement}
    assert patch.id in run("verify-file", cert, "--public-key", tmp_path / "owner.pub").stdout
    assert run("verify-file", cert, "--public-key", tmp_path / "other.pub").exit_code == 5
    assert run_on(serving, "log", "--verify", "--expect-head", cert).exit_code == 0
    changed = json.loads(cert.read_text())
    changed["payload"] = changed["payload"][:-8] + "AAAAAAA="
    cert.write_text(json.dumps(changed))
    assert run("verify-file", cert, "--public-key", tmp_path / "owner.pub").exit_code == 5


def test_a_head_is_signed_to_be_kept_elsewhere(serving: FakeEngine, tmp_path: Path) -> None:
    run("keygen", tmp_path / "owner")
    kept = tmp_path / "head.json"
    kept.write_text(run_on(serving, "log", "--head", "--key", tmp_path / "owner.key").stdout)
    found = document(run("verify-file", kept, "--public-key", tmp_path / "owner.pub", "--json"))
    head = document(run_on(serving, "log", "--head", "--json"))
    assert found["statement"]["predicate"]["ledger"]["head"] == head
    assert run_on(serving, "log", "--verify", "--expect-head", kept).exit_code == 0
    serving.record("change-done", {"before": [], "after": []})
    serving.entries[0]["time"] = "2026-11-24T02:00:00.000Z"
    assert run_on(serving, "log", "--verify", "--expect-head", kept).exit_code == 9
    assert run_on(serving, "log", "--key", tmp_path / "owner.key").exit_code == 2
