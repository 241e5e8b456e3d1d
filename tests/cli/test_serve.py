"""``patcher serve``: which words are ours, which are vLLM's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import environment, run


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What a stand-in for the real start was called with."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(
        "patcher.engine.serve.serve", lambda *given, **named: calls.append((given, named))
    )
    return calls


@pytest.mark.parametrize(
    "words",
    [
        ["m", "--port", "8001", "--enforce-eager"],
        ["m", "-tp", "2", "-dph", "h", "-O3", "--max-model-len=2048"],
        ["m", "--stateful", "--jsonish", "{}", "--token-files", "x"],
        ["m"],
    ],
    ids=" ".join,
)
def test_unknown_options_go_to_vllm_in_order(
    started: list[tuple[tuple[Any, ...], dict[str, Any]]], words: list[str]
) -> None:
    assert run("serve", *words).exit_code == 0
    (given, named), *_ = started
    assert given == ("m", words[1:])
    assert named == {"state": None, "token_file": None, "no_restore": False, "trust": None}


def test_our_options_are_ours_wherever_they_stand(
    started: list[tuple[tuple[Any, ...], dict[str, Any]]], tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.touch()
    words = ["--state", "s", "m", "--port", "1", "--token-file=t", "--no-restore", "--seed", "3"]
    assert run("serve", *words, f"--trust={policy}").exit_code == 0
    (given, named), *_ = started
    assert given == ("m", ["--port", "1", "--seed", "3"])
    assert named == {
        "state": Path("s"),
        "token_file": Path("t"),
        "no_restore": True,
        "trust": policy,
    }


def test_after_two_hyphens_everything_is_vllms(
    started: list[tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    assert run("serve", "m", "--", "--state", "x").exit_code == 0
    assert started[0][0] == ("m", ["--state", "x"])


def test_json_is_printed_before_vllm_starts_and_its_log_goes_to_stderr(tmp_path: Path) -> None:
    script = (
        "import sys, patcher.engine.serve as module\n"
        "def start(*given, **named):\n"
        "    sys.stdout.write('a line of vLLM\\n')\n"
        "module.serve = start\n"
        "from patcher.cli import main\n"
        f"sys.argv = ['patcher', 'serve', 'm', '--state', {str(tmp_path)!r}, '--json']\n"
        "main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment()
    )
    told = json.loads(result.stdout)
    assert told["state"] == str(tmp_path)
    assert told["token_file"] == str(tmp_path / "token")
    assert result.stderr == "a line of vLLM\n"


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patcher.engine.serve.find_spec", lambda name: None)
    result = run("serve", "m")
    assert result.exit_code == 2
    assert "vllm-patcher[engine]" in result.stderr


def test_a_wrong_policy_ends_it_before_a_model_is_loaded(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("signatures = 2\n")
    result = run("serve", "m", "--trust", policy, "--port", "1")
    assert result.exit_code == 5
    assert "2 signatures of 0 signers" in result.stderr
