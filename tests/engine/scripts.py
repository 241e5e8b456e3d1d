"""Scripts that use ``vllm.LLM``, each in a process of its own, as a user would run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
SECONDS = 400
_MARK = "found: "  # begins the line that is for the test: vLLM writes lines of its own


def run_script(module: str, *arguments: str | Path, **environment: str) -> dict[str, Any]:
    """Run ``python -m tests.engine.MODULE ARGUMENTS…``; what it gave to :func:`say`."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # Tiny models: threads that wait for each other take longer than the sums do.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    outside = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.engine.{module}", *map(str, arguments)],
        env={**outside, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    said = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    found: dict[str, Any] = json.loads(said[-1].removeprefix(_MARK))
    return found


def say(found: dict[str, Any]) -> None:
    """Hand what a script found to the test."""
    sys.stdout.write(f"\n{_MARK}{json.dumps(found)}\n")
    sys.stdout.flush()
