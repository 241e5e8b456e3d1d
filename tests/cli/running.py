"""Ways to run the command: in this process, as a process, and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from click.testing import CliRunner, Result

from patcher.cli.root import cli
from tests.fake_engine import TOKEN, FakeEngine

COMMAND = (sys.executable, "-m", "patcher")
# Variables that would change what the command does or prints.
CLEAN = dict.fromkeys(
    (
        "PATCHER_ENGINE",
        "PATCHER_TOKEN",
        "PATCHER_DEBUG",
        "NO_COLOR",
        "FORCE_COLOR",
        "VLLM_PLUGINS",
    )
)


def run(*words: object, **environment: str | None) -> Result:
    """The command in this process; stdout and stderr come apart."""
    return CliRunner().invoke(cli, [str(word) for word in words], env={**CLEAN, **environment})


def run_on(fake: FakeEngine, *words: object) -> Result:
    """The same, with the fake engine and its token in the environment."""
    return run(*words, PATCHER_ENGINE=fake.url, PATCHER_TOKEN=TOKEN)


def document(result: Result) -> Any:
    """The one JSON document on stdout."""
    return json.loads(result.stdout)


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what would change the command."""
    kept = {name: value for name, value in os.environ.items() if name not in CLEAN}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **(more or {})}


def on_terminal(*words: str, **more: str) -> str:
    """What the command writes to stdout and stderr where both are one terminal."""
    ours, theirs = pty.openpty()
    try:
        settings = environment({"TERM": "xterm-256color", "COLUMNS": "100", **more})
        process = subprocess.Popen(
            [*COMMAND, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=settings
        )
        os.close(theirs)
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the terminal's other end is closed
                break
            if not chunk:
                break
            shown += chunk
        process.wait(30)
    finally:
        os.close(ours)
    return shown.decode()
