"""Commands that speak to an engine: what they print and what they change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import document, run, run_on
from tests.fake_engine import TOKEN, FakeEngine, json_reply, problem, version_of
from tests.small_patch import MODULE, small_patch


def test_apply_gives_the_stack_and_what_it_took(fake: FakeEngine, patch_file: Path) -> None:
    told = document(run_on(fake, "apply", patch_file, "--json"))
    assert told == {
        "change": "c0ffee",
        "stack": [small_patch().id],
        "weight_version": version_of(fake.stack),
        "seconds": 0.25,
        "pause_ms": 31.5,
    }
    assert fake.stack == told["stack"]


def test_apply_passes_policy_and_reason_on(fake: FakeEngine, patch_file: Path) -> None:
    run_on(fake, "apply", patch_file, "--in-flight", "abort", "--reason", "request 17")
    assert b'"in_flight":"abort"' in fake.requests[-1].body.replace(b" ", b"")
    assert fake.entries[-1]["detail"]["reason"] == "request 17"


def test_guards_go_with_a_change_and_come_back(
    fake: FakeEngine, patch_file: Path, tmp_path: Path
) -> None:
    guards = tmp_path / "g.jsonl"
    guards.write_text('{"name": "stays", "prompt": "p", "must_contain": "x"}\n')
    told = document(run_on(fake, "apply", patch_file, "--guard", guards, "--json"))
    assert told["guards"] == [{"guard": "stays", "ok": True}]
    sent = json.loads(fake.requests[-1].body)["guards"]
    assert sent == [{"name": "stays", "prompt": "p", "must_contain": "x", "tokens": 24}]
    result = run_on(fake, "revert", "--all", "--guard", guards, "--guard", guards)
    assert "2 bound(s) hold" in result.stdout


def test_a_breached_guard_is_exit_13_and_tells_all_of_them(
    fake: FakeEngine, patch_file: Path, tmp_path: Path
) -> None:
    guards = tmp_path / "g.jsonl"
    guards.write_text('{"prompt": "p", "must_contain": "x"}\n')
    row = {"guard": "g.jsonl line 1", "bound": "must_contain", "value": False, "ok": False}
    refused = problem("guard-breached", 422, "One did not hold.", "Look.")
    body = json.dumps({**json.loads(refused.body), "guards": [row]}).encode()
    fake.instead["PUT", "stack"] = refused._replace(body=body)
    result = run_on(fake, "apply", patch_file, "--guard", guards, "--json")
    assert result.exit_code == 13
    assert document(result)["error"]["guards"] == [row]
    fake.entries.append(
        {"seq": 1, "time": "t", "event": "change-failed", "detail": {"guards": [row]}}
    )
    assert "guards=[g.jsonl line 1: must_contain False]" in run_on(fake, "log").stdout


def test_guards_that_are_none_are_exit_11_and_change_nothing(
    fake: FakeEngine, patch_file: Path, tmp_path: Path
) -> None:
    guards = tmp_path / "g.jsonl"
    guards.write_text('{"prompt": "p"}\n')
    result = run_on(fake, "apply", patch_file, "--guard", guards, "--json")
    assert result.exit_code == 11
    assert "g.jsonl line 1" in document(result)["error"]["message"]
    assert fake.requests == []


def test_a_time_to_live_is_sent_shown_and_confirmed(fake: FakeEngine, tmp_path: Path) -> None:
    stays, goes = small_patch(0), small_patch(1)
    stays.write(tmp_path / "stays.st")
    goes.write(tmp_path / "goes.st")
    run_on(fake, "apply", tmp_path / "stays.st")
    assert "expires" not in run_on(fake, "status").stdout
    run_on(fake, "apply", tmp_path / "goes.st", "--ttl", "2h")
    assert json.loads(fake.requests[-1].body)["ttl"] == 7200
    lines = run_on(fake, "status").stdout.splitlines()
    assert any(goes.id[:12] in line and "2026-11-24T05:00" in line for line in lines)
    assert any(stays.id[:12] in line and "stays" in line for line in lines)
    told = document(run_on(fake, "confirm", goes.id[:6], "--json"))
    assert told == {"confirmed": [goes.id]}
    assert "nothing" in run_on(fake, "confirm", "--all").stdout
    assert fake.expires == {}


def test_confirm_wants_ids_that_are_in_force_or_all(fake: FakeEngine) -> None:
    assert run_on(fake, "confirm").exit_code == 2
    assert run_on(fake, "confirm", "abcd", "--all").exit_code == 2
    assert run_on(fake, "confirm", "abcd").exit_code == 6


@pytest.mark.parametrize("ttl", ["", "2", "2 hours", "h", "-1h", "0s", "367d", "1e3s", "nan"])
def test_a_duration_that_is_none_is_exit_2_and_changes_nothing(
    fake: FakeEngine, patch_file: Path, ttl: str
) -> None:
    result = run_on(fake, "apply", patch_file, "--ttl", ttl, "--json")
    assert result.exit_code == 2
    error = document(result)["error"]
    assert "duration" in error["message"]
    assert error["cure"]
    assert fake.requests == []


def test_apply_says_for_people_how_long_serving_paused(fake: FakeEngine, patch_file: Path) -> None:
    result = run_on(fake, "apply", patch_file)
    assert "paused for 32 ms" in result.stdout
    assert small_patch().id[:12] in result.stdout


def test_revert_by_shortened_id_and_of_all(fake: FakeEngine, tmp_path: Path) -> None:
    patches = [small_patch(seed) for seed in range(3)]
    for number, patch in enumerate(patches):
        patch.write(tmp_path / f"{number}.st")
    run_on(fake, "apply", *sorted(tmp_path.glob("*.st")))
    told = document(run_on(fake, "revert", patches[1].id[:6], "--json"))
    assert told["stack"] == [patches[0].id, patches[2].id]
    told = document(run_on(fake, "revert", "--all", "--json"))
    assert told["stack"] == fake.stack == []
    assert "nothing: the base" in run_on(fake, "revert", "--all").stdout


def test_an_ambiguous_id_is_exit_6_and_changes_nothing(fake: FakeEngine) -> None:
    fake.stack = ["abcd" + "0" * 60, "abcd" + "1" * 60]
    engine = {"vllm": "0", "patcher": "0", "model": "m", "platform": "cpu"}
    status = {"engine": engine, "stack": fake.stack, "weight_version": version_of(fake.stack)}
    fake.instead["GET", "status"] = json_reply(status)
    result = run_on(fake, "revert", "abcd", "--json")
    assert result.exit_code == 6
    assert document(result)["error"]["code"] == "ambiguous-id"
    assert len(fake.stack) == 2


def test_status_tells_per_patch_and_per_module_and_since_when(fake: FakeEngine) -> None:
    with_title = small_patch(1, title="request 17")
    for patch in (small_patch(), with_title):
        fake.held[patch.id] = patch.data
        fake.stack.append(patch.id)
    told = document(run_on(fake, "status", "--json"))
    assert {"engine", "base", "stack", "weight_version", "patches", "modules"} <= set(told)
    lines = run_on(fake, "status").stdout.splitlines()
    assert any("request 17" in line and "2026-11-24T03:00" in line for line in lines)
    newest_first = f"{with_title.id[:12]} 2, {small_patch().id[:12]} 2"
    assert any(line.startswith(MODULE) and newest_first in line for line in lines)


def test_status_says_which_patches_cost_time_at_every_token(fake: FakeEngine) -> None:
    assert "quantised" not in run_on(fake, "status").stderr
    fake.overlaid = [MODULE]
    assert document(run_on(fake, "status", "--json"))["overlaid"] == [MODULE]
    assert "1 of the modules are quantised" in run_on(fake, "status").stderr


def test_status_of_the_base_is_short(fake: FakeEngine) -> None:
    result = run_on(fake, "status")
    assert "0 patch(es)" in result.stdout
    assert "module" not in result.stdout


def test_verify_says_what_was_read(fake: FakeEngine, patch_file: Path) -> None:
    run_on(fake, "apply", patch_file)
    assert document(run_on(fake, "verify", "--json"))["modules"] == {MODULE: True}
    result = run_on(fake, "verify")
    assert result.exit_code == 0
    assert "All of them" in result.stdout


def test_verify_is_exit_9_where_weights_differ(fake: FakeEngine, patch_file: Path) -> None:
    run_on(fake, "apply", patch_file)
    fake.live_ok = False
    result = run_on(fake, "verify", "--json")
    assert result.exit_code == 9
    assert document(result)["ok"] is False
    result = run_on(fake, "verify")
    assert result.exit_code == 9
    assert "DIFFER" in result.stdout
    assert "All of them" not in result.stdout
    assert result.stderr.startswith("error: ")


def test_verify_heals_first_where_it_is_told_to(fake: FakeEngine, patch_file: Path) -> None:
    run_on(fake, "apply", patch_file)
    fake.live_ok = False
    assert run_on(fake, "verify", "--json").exit_code == 9
    assert document(run_on(fake, "verify", "--heal", "--json"))["ok"] is True


def test_log_shows_the_ledger(fake: FakeEngine, patch_file: Path) -> None:
    assert run_on(fake, "log").stdout == "No entries.\n"
    run_on(fake, "apply", patch_file, "--reason", "request 17")
    run_on(fake, "revert", "--all")
    told = document(run_on(fake, "log", "--json"))
    assert [entry["seq"] for entry in told["entries"]] == [1, 2]
    assert document(run_on(fake, "log", "--after", "1", "--json"))["entries"][0]["seq"] == 2
    lines = run_on(fake, "log").stdout.splitlines()
    assert "request 17" in lines[1]
    assert f"[{small_patch().id[:12]}]" in lines[1]


@pytest.mark.parametrize("way", ["options", "token file", "environment"])
def test_engine_and_token_can_be_given_each_way(fake: FakeEngine, tmp_path: Path, way: str) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    result = {
        "options": lambda: run("status", "--engine", fake.url, "--token", TOKEN),
        "token file": lambda: run(
            "status", "--engine", fake.url, "--token-file", tmp_path / "token", PATCHER_TOKEN="no"
        ),
        "environment": lambda: run("status", PATCHER_ENGINE=fake.url, PATCHER_TOKEN=TOKEN),
    }[way]()
    assert result.exit_code == 0
