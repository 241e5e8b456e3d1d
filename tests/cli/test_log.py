"""``patcher log``: what an operator, an auditor and a forger get from it."""

from __future__ import annotations

import copy
import csv
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import COMMAND, document, environment, run, run_on
from tests.conftest import REPOSITORY
from tests.fake_engine import TOKEN, FakeEngine, json_reply, problem, version_of
from tests.small_patch import small_patch

A, B = small_patch(0).id, small_patch(1).id
NOON = "2026-11-24T12:00:00Z"


@pytest.fixture
def told(fake: FakeEngine) -> FakeEngine:
    """An engine with a history of five entries, and A and B in force."""
    for patch in (small_patch(0), small_patch(1)):
        fake.held[patch.id] = patch.data
    fake.record("start", {"stack": []})
    fake.record("change-intent", {"before": [], "after": [A], "actor": "admin"})
    fake.record("change-done", {"before": [], "after": [A], "actor": "admin"})
    fake.record("patch-stored", {"patch": B, "actor": "admin"})
    fake.record("change-done", {"before": [A], "after": [A, B], "actor": "night shift"})
    fake.stack = [A, B]
    return fake


def numbers(fake: FakeEngine, *words: object) -> list[int]:
    result = run_on(fake, "log", *words, "--json")
    assert result.exit_code == 0, result.output
    return [entry["seq"] for entry in document(result)["entries"]]


def test_filters_choose_entries(told: FakeEngine) -> None:
    assert numbers(told, "--event", "change") == [2, 3, 5]
    assert numbers(told, "--event", "change-done", "--event", "start") == [1, 3, 5]
    assert numbers(told, "--patch", B[:8]) == [4, 5]
    assert numbers(told, "--patch", B, "--after", 4) == [5]
    assert numbers(told, "--patch", "f" * 64) == []
    assert numbers(told, "--since", "2026-11-24T05:02:00+02:00") == [2, 3, 4, 5]
    assert numbers(told, "--until", "2026-11-24T03:02:00Z") == [1]
    assert "No entries." in run_on(told, "log", "--event", "nonsense").stdout


def test_an_id_that_nothing_was_done_with_is_exit_6(told: FakeEngine) -> None:
    result = run_on(told, "log", "--patch", "ffffffff", "--json")
    assert result.exit_code == 6
    assert document(result)["error"]["code"] == "unknown-patch"


@pytest.mark.parametrize(
    "words",
    [
        "--verify --at NOON",
        "--head --verify",
        "--verify --after 3",
        "--at NOON --event change",
        "--head --follow",
        "--expect-head HASH --format csv",
        "--follow --json",
        "--follow --file FILE",
        "--follow --export x.jsonl",
        "--format csv --json",
        "--format csv --export x.csv",
        "--export x.txt",
        "--since yesterday",
        "--at 2026-11-24",
        "--expect-head no-such-file",
        "--expect-head deadbeef",
        "--expect-head FILE",
        "--file no-such-file",
    ],
)
def test_words_that_say_nothing_together_are_exit_2(
    told: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("{}")
    given = words.replace("NOON", NOON).replace("HASH", "0" * 64).split()
    result = run_on(told, "log", *given)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" or "--json" in given
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


# -- proof -----------------------------------------------------------------------------------------


def test_a_ledger_that_holds_is_proven_on_the_engine_and_from_a_file(
    told: FakeEngine, tmp_path: Path
) -> None:
    proof = document(run_on(told, "log", "--verify", "--json"))
    last = told.entries[-1]
    assert proof == {
        "ok": True,
        "entries": 5,
        "head": {"seq": 5, "hash": last["hash"], "time": last["time"]},
        "stack": [A, B],
        "checked": ["chain", "engine"],
        "faults": [],
    }
    assert "The chain holds" in run_on(told, "log", "--verify").stdout
    file = tmp_path / "ledger.jsonl"
    assert run_on(told, "log", "--export", file).exit_code == 0
    result = run("log", "--verify", "--file", file, "--json")  # no engine, no token
    assert result.exit_code == 0
    assert document(result) == {**proof, "checked": ["chain"]}


def rewrite(entries: list[dict[str, Any]]) -> None:
    """History as a forger with the database would have it, hashes and all."""
    forged = FakeEngine()
    for entry in entries:
        forged.record(entry["event"], {**entry["detail"], "actor": "somebody else"})
    entries[:] = forged.entries


FORGERIES: dict[str, tuple[Callable[[list[dict[str, Any]]], object], int]] = {
    "another actor": (lambda entries: entries[2]["detail"].update(actor="me"), 3),
    "another time": (lambda entries: entries[4].update(time="2026-11-23T00:00:00.000Z"), 5),
    "an entry dropped": (lambda entries: entries.pop(3), 4),
    "the first dropped": (lambda entries: entries.pop(0), 1),
    "two swapped": (lambda entries: entries.insert(1, entries.pop(2)), 2),
    "one twice": (lambda entries: entries.insert(1, entries[1]), 3),
    "a field more": (lambda entries: entries[1].update(approved=True), 2),
    "all of it gone": (lambda entries: entries.clear(), 0),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_ledger_that_was_touched_is_exit_9_and_says_where(told: FakeEngine, forgery: str) -> None:
    touch, where = FORGERIES[forgery]
    told.entries = copy.deepcopy(told.entries)
    touch(told.entries)
    result = run_on(told, "log", "--verify", "--json")
    assert result.exit_code == 9
    proof = document(result)
    assert proof["ok"] is False
    assert proof["faults"][0]["entry"] == where
    assert proof["head"] is proof["stack"] is None
    result = run_on(told, "log", "--verify")
    assert result.exit_code == 9
    assert "holds" not in result.stdout
    assert result.stderr.startswith(f"error: entry {where}:" if where else "error: the")
    for question in (["--head"], ["--at", NOON]):
        result = run_on(told, "log", *question, "--json")
        assert result.exit_code == 9, question


def test_a_tail_that_was_cut_off_shows_against_the_engine(told: FakeEngine) -> None:
    del told.entries[4:]
    result = run_on(told, "log", "--verify", "--json")
    assert result.exit_code == 9
    assert document(result)["head"]["seq"] == 4


def test_an_engine_that_serves_what_its_ledger_does_not_say_is_exit_9(told: FakeEngine) -> None:
    told.stack = [B]
    result = run_on(told, "log", "--verify", "--json")
    assert result.exit_code == 9
    assert "stack" in document(result)["faults"][0]["what"]


def test_a_change_while_it_is_proven_is_no_fault(told: FakeEngine) -> None:
    """The ledger is read before and after the status, and either stack may be told."""
    seen = []
    plain = told.get_status

    def changing(request: Any) -> Any:
        reply = plain(request)
        told.record("change-done", {"before": told.stack, "after": [B]})
        told.stack = [B]
        seen.append(reply)
        return reply

    told.get_status = changing  # type: ignore[method-assign]
    result = run_on(told, "log", "--verify", "--json")
    assert result.exit_code == 0, result.output
    assert document(result)["stack"] == [B]
    assert len(seen) == 1


def entry_with(detail: str) -> str:
    chained = f'"previous": "{"0" * 64}", "hash": "{"0" * 64}"'
    return f'{{"seq": 3, "time": "{NOON}", "event": "x", "detail": {detail}, {chained}}}'


@pytest.mark.parametrize("line", [
    '{"seq": 1}', "", "{", "[]", '{"seq": 1, "seq": 1}',
    entry_with('{"a": 1e999}'), entry_with(r'{"actor": "\ud800"}'),
])  # fmt: skip
def test_a_file_with_a_line_that_is_no_entry_is_exit_9(
    told: FakeEngine, tmp_path: Path, line: str
) -> None:
    file = tmp_path / "ledger.jsonl"
    run_on(told, "log", "--export", file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    result = run("log", "--verify", "--file", file, "--json")
    assert result.exit_code == 9
    assert document(result)["faults"][0]["what"].startswith("line 3: ")
    for words in ([], ["--head"], ["--at", NOON]):
        assert run("log", "--file", file, *words).exit_code == 9


def test_an_empty_file_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert run("log", "--verify", "--file", tmp_path / "empty.jsonl").exit_code == 9


@pytest.mark.parametrize("way", ["hash", "hash and number", "text", "json"])
def test_a_head_that_was_kept_is_still_there_until_history_is_rewritten(
    told: FakeEngine, tmp_path: Path, way: str
) -> None:
    last = told.entries[-1]
    kept = tmp_path / "head"
    kept.write_text(run_on(told, "log", "--head", *["--json"] * (way == "json")).stdout)
    head = {"hash": last["hash"], "hash and number": f"{last['hash']}:5"}.get(way, kept)
    told.record("change-done", {"before": [A, B], "after": [A]})
    told.stack = [A]
    result = run_on(told, "log", "--expect-head", head, "--json")
    assert result.exit_code == 0, result.output
    assert document(result)["checked"] == ["chain", "engine", "head"]
    result = run_on(told, "log", "--head", "--expect-head", head)  # keeps the next one
    assert result.stdout == f"{told.entries[-1]['hash']}:6 {told.entries[-1]['time']}\n"
    rewrite(told.entries)
    assert run_on(told, "log", "--verify").exit_code == 0, "the chain alone doesn't show it"
    for words in (["--verify"], ["--head"], ["--at", NOON], []):
        result = run_on(told, "log", *words, "--expect-head", head, "--json")
        assert result.exit_code == 9, words
    del told.entries[4:]
    assert run_on(told, "log", "--verify", "--expect-head", head).exit_code == 9


# -- what was in force -----------------------------------------------------------------------------


def test_the_stack_of_a_time_is_told(told: FakeEngine) -> None:
    found = document(run_on(told, "log", "--at", "2026-11-24T03:04:30Z", "--json"))
    assert found == {
        "at": "2026-11-24T03:04:30.000Z",
        "stack": [A],
        "weight_version": version_of([A]),
        "entry": {"seq": 3, "time": "2026-11-24T03:03:00.000Z", "event": "change-done"},
        "suspended": False,
        "ambiguous": False,
    }
    found = document(run_on(told, "log", "--at", "2026-11-24T03:00:00Z", "--json"))
    assert (found["stack"], found["entry"]) == ([], None)
    told.record("start-without-restore", {"held": [A, B]})
    result = run_on(told, "log", "--at", NOON)
    assert "nothing: the base, by a start without restore" in result.stdout
    assert "entry 6, start-without-restore" in result.stdout


# -- files and forms -------------------------------------------------------------------------------


def test_an_export_has_all_or_what_was_chosen(told: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    result = document(run_on(told, "log", "--export", file, "--json"))
    assert result["path"] == str(file)
    assert (result["entries"], result["head"]["hash"]) == (5, told.entries[-1]["hash"])
    lines = file.read_text().splitlines()
    assert [json.loads(line) for line in lines] == told.entries
    assert run_on(told, "log", "--format", "jsonl").stdout.splitlines() == lines
    again = run("log", "--file", file, "--event", "change-done", "--format", "jsonl").stdout
    assert again.splitlines() == [lines[2], lines[4]]
    run_on(told, "log", "--export", file, "--after", 4)
    assert file.read_text().splitlines() == lines[4:]
    assert run("log", "--verify", "--file", file).exit_code == 9, "a part proves nothing"


def test_a_table_for_spreadsheets_has_the_covered_text(told: FakeEngine, tmp_path: Path) -> None:
    told.record("change-done", {"before": [A, B], "after": [], "reason": "=1+1"})
    file = tmp_path / "ledger.csv"
    run_on(told, "log", "--export", file)
    with file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert [row["seq"] for row in rows] == list("123456")
    assert (rows[4]["actor"], rows[4]["after"]) == ("night shift", f"{A} {B}")
    assert rows[5]["reason"] == "'=1+1"
    assert json.loads(rows[5]["detail"]) == told.entries[5]["detail"]
    assert run_on(told, "log", "--format", "csv").stdout.splitlines()[0].startswith("seq,")


def test_a_place_that_cannot_be_written_is_exit_2(told: FakeEngine, tmp_path: Path) -> None:
    assert run_on(told, "log", "--export", tmp_path / "no" / "x.csv").exit_code == 2


def test_the_protocols_own_program_proves_an_export(told: FakeEngine) -> None:
    manual = (REPOSITORY / "docs" / "protocol.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", manual, re.S)
    told.record(
        "change-done", {"before": [A, B], "after": [], "reason": 'für "17" \U0001f600\x7f/'}
    )
    told.record("change-intent", {"ttl": 7200.0, "guards": [{"value": 1e-7}, {"value": 1e16}]})
    export = run_on(told, "log", "--format", "jsonl").stdout

    def proven(text: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", program]
        return subprocess.run(words, input=text, capture_output=True, text=True)

    assert proven(export).stdout == f"{told.entries[-1]['hash']}:7\n"
    assert proven(export.replace("7200.0", "7200")).stderr == "broken at entry 7\n"


# -- following -------------------------------------------------------------------------------------


class Following:
    """``patcher log --follow`` as a process."""

    def __init__(self, fake: FakeEngine, *words: str) -> None:
        settings = environment({"PATCHER_ENGINE": fake.url, "PATCHER_TOKEN": TOKEN})
        self.process = subprocess.Popen(
            [*COMMAND, "log", "--follow", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=settings,
            text=True,
        )
        self._limit = threading.Timer(60, self.process.kill)
        self._limit.start()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self, how: int = signal.SIGINT) -> tuple[int, str, str]:
        if how:
            self.process.send_signal(how)
        out, told = self.process.communicate(timeout=30)
        self._limit.cancel()
        return self.process.returncode, out, told


def test_following_shows_what_comes_and_ends_cleanly_with_ctrl_c(told: FakeEngine) -> None:
    following = Following(told, "--event", "change-done")
    assert following.line().split()[:1] == ["3"]
    assert "night shift" in following.line()
    told.record("patch-stored", {"patch": A})
    told.record("change-done", {"before": [A, B], "after": [], "reason": "request 17"})
    assert "request 17" in following.line()
    assert following.end() == (0, "", "")


def test_following_waits_for_an_engine_that_starts_anew(told: FakeEngine) -> None:
    following = Following(told, "--format", "jsonl", "--after", "4")
    assert json.loads(following.line())["seq"] == 5
    told.instead["GET", "ledger"] = problem("engine-unreachable", 502, "No answer.")
    asked = len(told.requests)
    while len(told.requests) < asked + 2:
        time.sleep(0.05)
    del told.instead["GET", "ledger"]
    told.record("start", {"stack": [A, B]})
    assert json.loads(following.line()) == told.entries[5]
    code, out, err = following.end()
    assert (code, out) == (0, "")
    assert err == "No answer. Waiting for it.\n"


def test_following_a_ledger_that_is_rewritten_is_exit_9(told: FakeEngine) -> None:
    following = Following(told)
    for _ in told.entries:
        following.line()
    rewrite(told.entries)
    code, out, err = following.end(0)
    assert (code, out) == (9, "")
    assert "rewritten" in err


def test_following_without_permission_ends_at_once(told: FakeEngine) -> None:
    told.instead["GET", "ledger"] = problem("not-permitted", 401, "No.")
    assert run_on(told, "log", "--follow").exit_code == 10


def test_what_is_no_ledger_is_exit_7_or_9_and_no_defect(told: FakeEngine) -> None:
    entry = {"seq": "x", "time": 1, "event": None, "detail": {}}
    for entries, code in (([entry], 9), ([7], 7), ([{"seq": 1}], 7), ({}, 7)):
        told.instead["GET", "ledger"] = json_reply({"entries": entries})
        for words in (["--verify"], ["--head"], ["--at", NOON]):
            assert run_on(told, "log", *words).exit_code == code
