"""From the start of a server's process to the first token that it served.

Three servers, one after another in every round, the order moved on by one: vLLM's own without the
plugin; `patcher serve` with an empty state folder; the same with 64 random patches to restore, on
all layers. Each has a copy of its state folder as it was, and is killed once it has answered.
Shown are seconds; CPU seconds of all the server's processes until then, which other work on the
machine moves less; and, as the server's log tells it, how many of the seconds went into opening
the state folder and restoring. Ratios are within a round.

    python bench/start.py [--patches 64] [--seconds 200] [--quick] [--json]
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from load import MODEL, REPOSITORY, START_S, random_patches
from report import Check, Plot, Spread, at_most, document, finish, line, options, ratios

import patcher
from patcher.engine.stack import Stack
from patcher.engine.store import Store

QUESTION = "How long does a server take from its start to the first token that it served?"
PLAIN = "without the plugin"
BARS = {0: 1.02, 64: 1.05}  # by the patches to restore
ROUNDS = 2  # at least, but for --quick
WHY = (
    "Nothing waits for patcher but its imports (0.2 s of CPU in three processes) and `patcher"
    " serve` itself (0.15 s): beyond that it is the machine's noise, which few starts leave in.",
    "Restoring is nearly all the worker's: each module is read out of its pack twice (base,"
    " staged), and a read is a matrix product of d_in x d_in x d_out since oneDNN's packs"
    " have no inverse. Fewer reads, or a restore while the server still starts, would mend it.",
)
_TICK = os.sysconf("SC_CLK_TCK")


class Took(NamedTuple):
    """Seconds of a start: by the clock, of all its processes' CPU time, and restoring."""

    wall: float
    cpu: float
    restoring: float = 0.0


def state_with(model: Path, folder: Path, count: int) -> Path:
    """A state folder as a server leaves it after a change that applied so many patches."""
    patches = random_patches(model, count, 0, scale=0.1)
    store = Store(folder)
    for patch in patches:
        store.add_patch(patch, "bench")
    if patches:
        ids = [patch.id for patch in patches]
        store.commit(Stack(tuple(ids)), "change-done", {"before": [], "after": ids})
    return folder


def start(model: Path, state: Path | None, folder: Path, device: str) -> Took:
    """Start a server, ask it for one token, kill it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": ""}
    if device == "cpu":
        settings["VLLM_CPU_KVCACHE_SPACE"] = "1"
    if state is not None:
        words = ["-m", "patcher", "serve", str(model), "--state", str(state)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m"]
    words += ["--max-model-len", "1024", "--enforce-eager"]
    log = folder / "server.log"
    with log.open("wb") as out:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=out,
            stderr=out,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **settings},
            start_new_session=True,
        )
    try:
        _first_token(process, port, log)
        took = Took(time.monotonic() - began, _cpu_seconds(process.pid))
        if state is None:
            return took
        _check_restored(f"http://127.0.0.1:{port}", state)
        (ready,) = re.findall(r"patcher: ready after ([0-9.]+) s", log.read_text())
        return took._replace(restoring=float(ready))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _first_token(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    body = {"model": "m", "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
            answer.raise_for_status()
            return
        time.sleep(0.02)
    raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")


def _check_restored(url: str, state: Path) -> None:
    with patcher.Engine(url, token=(state / "token").read_text().strip()) as engine:
        served = tuple(engine.status()["stack"])
    if served != Store(state).committed().ids:
        raise SystemExit(f"{len(served)} patches are in force, which aren't those in the folder")


def _cpu_seconds(session: int) -> float:
    """Of the session's processes and of those that they have waited for."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += sum(map(int, fields[11:15]))
    return ticks / _TICK


def measure(
    model: Path, counts: Sequence[int], seconds: float, least: int, device: str
) -> dict[str, list[Took]]:
    """Rounds of starts, for about so many seconds."""
    took: dict[str, list[Took]] = {PLAIN: [], **{_name(count): [] for count in counts}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = {_name(n): state_with(model, folder / f"state-{n}", n) for n in counts}
        _warm_up()
        began = time.monotonic()
        number = 0
        while number < least or (time.monotonic() - began) * (number + 1) / number < seconds:
            ways = list(took)
            ways = [*ways[number % len(ways) :], *ways[: number % len(ways)]]
            for way in ways:
                state = None
                if way in made:
                    state = folder / "state"
                    shutil.rmtree(state, ignore_errors=True)
                    shutil.copytree(made[way], state)
                took[way].append(start(model, state, folder, device))
            number += 1
    return took


def _name(patches: int) -> str:
    return f"{patches} patches to restore"


def _warm_up() -> None:
    """Read from disk what the first start would have to."""
    words = [sys.executable, "-c", "import vllm.entrypoints.openai.api_server"]
    subprocess.run(words, check=True, capture_output=True)


def checks(took: Mapping[str, Sequence[Took]], counts: Sequence[int]) -> list[Check]:
    """What is held against the bars; a count without one of its own has the largest."""
    found = []
    plain = [each.wall for each in took[PLAIN]]
    for count in counts:
        value = ratios([each.wall for each in took[_name(count)]], plain).median
        bar = BARS.get(count, max(BARS.values()))
        found.append(at_most(f"first token, {_name(count)}", value, bar, WHY[count > 0]))
    return found


def rows(took: Mapping[str, Sequence[Took]]) -> list[dict[str, Any]]:
    plain = took[PLAIN]
    shown = []
    for way, each in took.items():
        wall, cpu = Spread.of(one.wall for one in each), Spread.of(one.cpu for one in each)
        by_wall = ratios([one.wall for one in each], [one.wall for one in plain])
        by_cpu = ratios([one.cpu for one in each], [one.cpu for one in plain])
        shown.append(
            {
                "server": way,
                "starts": len(each),
                "seconds": round(wall.median, 2),
                "least to most": f"{wall.low:.2f} to {wall.high:.2f}",
                "ratio": round(by_wall.median, 3),
                "its least to most": f"{by_wall.low:.3f} to {by_wall.high:.3f}",
                "CPU seconds": round(cpu.median, 2),
                "CPU ratio": round(by_cpu.median, 3),
                "restoring, s": round(Spread.of(one.restoring for one in each).median, 2),
            }
        )
    return shown


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--patches", type=int, nargs="+", default=[0, 64])
    parser.add_argument("--seconds", type=float, default=200.0, help="for all starts")
    args = parser.parse_args()
    least = 1 if args.quick else ROUNDS
    seconds = 0.0 if args.quick else args.seconds
    took = measure(args.model, args.patches, seconds, least, args.device)
    plain = [each.wall for each in took[PLAIN]]
    points = {n: ratios([each.wall for each in took[_name(n)]], plain) for n in args.patches}
    plot = Plot(
        "patches to restore",
        "time to first token, without the plugin = 1",
        [line("patcher serve", dict(points))],
        max(BARS.values()),
        "",
    )
    found = document(QUESTION, rows(took), checks(took, args.patches), args, plot=plot)
    return finish(found, args)


if __name__ == "__main__":
    sys.exit(main())
