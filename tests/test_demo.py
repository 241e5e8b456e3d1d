"""The demo leaves nothing behind, however it ends (that its claims hold it says itself)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# The demo with a story that starts a tree of processes in place of the server, and then waits.
SCRIPT = """
import pathlib, subprocess, sys, time
sys.path.insert(0, "bench")
import demo

class Server:
    def __init__(self, folder):
        pathlib.Path(sys.argv[1], "folder").write_text(str(folder))
        tree = "trap '' TERM; sleep 300 & sleep 300"
        process = subprocess.Popen(["bash", "-c", tree], start_new_session=True)
        demo._STARTED.append(process)
        pathlib.Path(sys.argv[1], "group").write_text(str(process.pid))

def tell(steps, folder, server):
    if sys.argv[2] == "raise":
        raise RuntimeError("something unforeseen")
    time.sleep(300)

demo.Server, demo.tell, demo.PATIENCE_S = Server, tell, 0.5
sys.exit(demo.main())
"""


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("ending", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (None, 1)],
    ids=["ctrl-c", "terminated", "hung-up", "exception"],
)
def test_the_server_ends_with_the_demo(
    tmp_path: Path, ending: signal.Signals | None, code: int
) -> None:
    words = [sys.executable, "-c", SCRIPT, str(tmp_path), "wait" if ending else "raise"]
    process = subprocess.Popen(
        words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    written = tmp_path / "group"
    while not (written.exists() and written.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    group = int(written.read_text())
    if ending is not None:
        assert alive(group)
        process.send_signal(ending)
    process.communicate(timeout=60)
    assert process.returncode == code
    deadline = time.monotonic() + 10  # the dead count until init has taken note of them
    while alive(group) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(group)
    assert not Path((tmp_path / "folder").read_text()).exists()
