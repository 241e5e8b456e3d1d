"""Help, versions, completion, and how fast the command answers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import version

import click
import pytest

from patcher.cli.root import SECTIONS, cli
from tests.cli.running import COMMAND, document, environment, run

NAMES = [name for section in SECTIONS.values() for name in section]
HEAVY = ("torch", "vllm", "transformers", "httpx", "rich", "pydantic", "numpy", "safetensors")


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def test_the_contracts_commands_are_there() -> None:
    contract = {
        "compute", "evaluate", "inspect", "serve", "apply", "revert", "status", "verify",
    }  # fmt: skip
    assert contract <= set(NAMES)
    assert {"log", "doctor", "completion"} <= set(NAMES)


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_groups_the_commands(option: str) -> None:
    result = run(option)
    assert result.exit_code == 0
    for section, names in SECTIONS.items():
        assert f"{section}:" in result.stdout
        assert all(f"  {name}" in result.stdout for name in names)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_short_help_json_and_hyphens(name: str) -> None:
    result = run(name, "-h")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    words = [word for param in command(name).params for word in param.opts if word[0] == "-"]
    assert not [word for word in words if "_" in word]


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['patcher', '--help']\n"
        "from patcher.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stderr.strip() == "[]"


def test_help_answers_in_a_fifth_of_a_second_over_bare_python() -> None:
    def best(*words: str) -> float:
        def once() -> float:
            began = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - began

        return min(once() for _ in range(5))

    assert best("-m", "patcher", "--help") - best("-c", "pass") < 0.2


def test_version_is_the_distributions() -> None:
    assert run("--version").stdout == f"patcher {version('vllm-patcher')}\n"


def test_a_mistyped_command_gets_a_suggestion() -> None:
    result = run("verifi")
    assert result.exit_code == 2
    assert "'verify'" in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_shells_script(shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_PATCHER_COMPLETE" in result.stdout
    as_json = document(run("completion", shell, "--json"))
    assert as_json == {"shell": shell, "script": result.stdout.removesuffix("\n")}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("patcher ver", "verify"), ("patcher apply --in-", "--in-flight")],
)
def test_completion_offers_commands_and_options(typed: str, offered: str) -> None:
    settings = {
        "_PATCHER_COMPLETE": "bash_complete",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    script = "from patcher.cli.root import cli; cli(prog_name='patcher')"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(settings)
    )
    assert offered in result.stdout


def test_the_installed_script_is_the_same_command() -> None:
    script = os.path.join(os.path.dirname(sys.executable), "patcher")
    ways = [[script, "--version"], [*COMMAND, "--version"]]
    told = [subprocess.run(way, capture_output=True, text=True).stdout for way in ways]
    assert told[0] == told[1] != ""
