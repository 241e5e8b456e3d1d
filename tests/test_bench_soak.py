"""A short sample of ``bench/soak.py``, on a random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.engine.tiny import tiny_llama


@pytest.mark.engine
def test_half_a_minute_of_load_holds_every_check(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "tiny")
    options = ["--seconds", "15", "--clients", "3", "--scale", "20", "--judged", "40", "--json"]
    done = subprocess.run(
        [sys.executable, "bench/soak.py", "--model", str(model), *options],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["changes"]["made"] > 0
    assert found["requests"]["answered"] > 0
    assert done.returncode == 0, [check for check, held in found["checks"].items() if not held]
