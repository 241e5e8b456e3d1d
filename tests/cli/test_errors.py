"""Every way of ending has its exit code, words on stderr, and under --json a document."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from patcher.errors import PatcherError
from tests.cli.running import COMMAND, document, environment, run, run_on
from tests.fake_engine import TOKEN, FakeEngine, problem
from tests.small_patch import DAMAGES, small_patch
from tests.test_client import subclasses


@pytest.mark.parametrize("kind", subclasses(PatcherError), ids=lambda kind: kind.code)
def test_each_error_of_the_engine_has_its_exit_code(
    fake: FakeEngine, kind: type[PatcherError]
) -> None:
    fake.instead["GET", "status"] = problem(kind.code, kind.http_status, "The cause.", "The cure.")
    result = run_on(fake, "status")
    assert result.exit_code == kind.exit_code
    assert result.stdout == ""
    assert result.stderr == "error: The cause.\nThe cure.\n"
    result = run_on(fake, "status", "--json")
    assert result.exit_code == kind.exit_code
    wanted = {"code": kind.code, "message": "The cause.", "cure": "The cure."}
    assert document(result) == {"error": {**wanted, "exit_code": kind.exit_code}}
    assert "The cause." in result.stderr


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["inspect", "apply"])
def test_a_damaged_file_is_exit_3_and_changes_nothing(
    fake: FakeEngine, tmp_path: Path, damage: str, command: str
) -> None:
    make, code = DAMAGES[damage]
    path = tmp_path / "p.st"
    path.write_bytes(make(small_patch().data))
    result = run_on(fake, command, path, "--json")
    assert result.exit_code == 3
    assert document(result)["error"]["code"] == code
    assert fake.requests == []


def test_a_patch_twice_is_exit_6_and_changes_nothing(fake: FakeEngine, patch_file: Path) -> None:
    assert run_on(fake, "apply", patch_file).exit_code == 0
    before = list(fake.stack)
    result = run_on(fake, "apply", patch_file, "--json")
    assert result.exit_code == 6
    assert document(result)["error"]["code"] == "already-applied"
    assert fake.stack == before


def test_an_unknown_id_is_exit_6_and_changes_nothing(fake: FakeEngine, patch_file: Path) -> None:
    run_on(fake, "apply", patch_file)
    result = run_on(fake, "revert", "0123456789", "--json")
    assert result.exit_code == 6
    assert document(result)["error"]["code"] == "unknown-patch"
    assert len(fake.stack) == 1


def test_a_missing_token_is_exit_10_and_changes_nothing(fake: FakeEngine, patch_file: Path) -> None:
    for command in (["apply", patch_file], ["revert", "--all"], ["status"], ["verify"], ["log"]):
        result = run(*command, "--json", PATCHER_ENGINE=fake.url)
        assert result.exit_code == 10, command
    assert fake.stack == []
    assert fake.held == {}


@pytest.mark.parametrize("command", ["status", "verify", "log", "doctor", "revert --all"])
def test_an_engine_that_is_down_is_exit_7(command: str) -> None:
    result = run(*command.split(), "--engine", "http://127.0.0.1:9", "--json")
    assert result.exit_code == 7


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["status", "--engine", "localhost"],
        ["status", "--nonsense"],
        ["apply", "--engine", "http://127.0.0.1:9"],
        ["apply", "there-is-no-such-file.st", "--engine", "http://127.0.0.1:9"],
        ["revert", "--engine", "http://127.0.0.1:9"],
        ["revert", "abcd", "--all", "--engine", "http://127.0.0.1:9"],
        ["apply", "--in-flight", "hope", "p.st"],
        ["compute", "--model", "m"],
        ["evaluate"],
        ["inspect"],
        ["serve"],
        ["serve", "--port", "8001"],
        ["no-such-command"],
        ["completion", "tcsh"],
    ],
    ids=" ".join,
)
def test_words_that_are_off_are_exit_2(words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    result = run(*words, "--json")
    assert result.exit_code == 2
    assert document(result)["error"]["code"] == "usage"


def test_a_defect_is_exit_1_and_says_where_but_not_what(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object) -> None:
        raise RuntimeError("The mother tongue of Jane Doe is Welsh")

    monkeypatch.setattr("patcher.client.Engine.status", broken)
    result = run_on(fake, "status", "--json")
    assert result.exit_code == 1
    assert document(result)["error"]["code"] == "internal"
    assert re.search(r"RuntimeError at test_errors\.py:\d+", result.stderr)
    assert "Welsh" not in result.output
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("way", ["option", "variable"])
def test_a_defect_can_be_shown_whole(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    def broken(self: object) -> None:
        raise RuntimeError("of this kind")

    monkeypatch.setattr("patcher.client.Engine.status", broken)
    if way == "option":
        result = run_on(fake, "--debug", "status")
    else:
        result = run("status", PATCHER_ENGINE=fake.url, PATCHER_TOKEN=TOKEN, PATCHER_DEBUG="1")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "of this kind" in result.stderr


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**wishes: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("patcher.doctor.examine", lambda *given: missing())
    result = run("doctor")
    assert result.exit_code == 2
    assert "pip install" in result.stderr


def test_ctrl_c_is_exit_130_without_a_traceback(fake: FakeEngine) -> None:
    fake.delay = 30
    settings = environment({"PATCHER_ENGINE": fake.url, "PATCHER_TOKEN": TOKEN})
    process = subprocess.Popen(
        [*COMMAND, "status"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=settings
    )
    while not fake.requests:
        time.sleep(0.01)
    fake.delay = 0
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in told


def test_a_reader_that_goes_away_gets_no_traceback(fake: FakeEngine) -> None:
    fake.entries = [
        {"seq": seq, "time": "t", "event": "e", "detail": {"reason": "x" * 200}}
        for seq in range(1, 2000)
    ]
    settings = environment({"PATCHER_ENGINE": fake.url, "PATCHER_TOKEN": TOKEN})
    process = subprocess.Popen(
        [*COMMAND, "log"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=settings
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(20) == 141


@pytest.mark.parametrize("gone", ["stdout", "stderr"])
def test_a_reader_that_goes_away_before_an_error_is_told_gets_no_traceback(gone: str) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    streams: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, gone: theirs}
    words = [*COMMAND, "inspect", "there-is-no-such-file.st", "--json"]
    done = subprocess.run(words, env=environment(), check=False, timeout=60, **streams)  # type: ignore[call-overload]
    os.close(theirs)
    assert done.returncode == 141
    assert b"Traceback" not in (done.stderr or b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    ("words", "full", "code"),
    [
        (["inspect", "there-is-no-such-file.st", "--json"], "stdout", 2),
        (["inspect", "there-is-no-such-file.st"], "stderr", 2),
        (["methods"], "stdout", 1),
        (["methods", "--json"], "stdout", 1),
    ],
)
def test_where_there_is_no_room_to_tell_an_error_its_code_is_told(
    words: list[str], full: str, code: int
) -> None:
    with Path("/dev/full").open("wb") as device:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, full: device}
        done = subprocess.run(  # type: ignore[call-overload]
            [*COMMAND, *words], env=environment(), check=False, timeout=60, **streams
        )
    assert done.returncode == code
    assert b"Traceback" not in (done.stderr or b"")
    assert b"Exception ignored" not in (done.stderr or b"")


def test_each_wrong_line_of_a_forget_set_has_a_line_of_its_own(fake: FakeEngine) -> None:
    fake.instead["GET", "status"] = problem("bad-forget-set", 422, "2 lines:\nline 1: a\nline 7: b")
    assert run_on(fake, "status").stderr == "error: 2 lines:\nline 1: a\nline 7: b\n"


def test_what_an_engine_says_cannot_steer_the_terminal(fake: FakeEngine) -> None:
    fake.instead["GET", "status"] = problem("stack-conflict", 409, "red \x1b[31m\x07 text")
    result = run_on(fake, "status")
    assert "\x1b" not in result.stderr
    assert "\\x1b[31m" in result.stderr


def test_the_token_is_never_shown(fake: FakeEngine, patch_file: Path, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN + "\n")
    address = ["--engine", fake.url, "--token-file", token_file]
    for words in (["apply", patch_file], ["status"], ["doctor"], ["log"], ["revert", "--all"]):
        for more in ([], ["--json"]):
            result = run(*words, *address, *more)
            assert TOKEN not in result.output
    fake.instead["*", "*"] = problem("internal", 500, "x")
    result = run("--debug", "status", *address)
    assert result.exit_code == 1
    assert TOKEN not in result.output


def test_a_file_without_a_token_is_refused(fake: FakeEngine, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    for content in (b"", b"\n", b"x" * 5000, b"\xff\xfe\x00"):
        token_file.write_bytes(content)
        result = run("status", "--engine", fake.url, "--token-file", token_file)
        assert result.exit_code == 2
    assert fake.requests == []
