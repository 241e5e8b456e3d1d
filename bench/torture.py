"""Kill -9 at random points of a change, and look at what is there after the next start.

    make torture                                         200 points, the last 30 on the real model
    python -m bench.torture --points 20 --seed 1         20 on the smallest model that shows it
    python -m bench.torture --points 0 --real 5 --json

One point: a change is asked for, and after a random part of the time that a change takes one
process (the API server, the engine core, a worker) gets a SIGKILL. Then all that is left of the
engine is ended, as a container does it, and the next start must show: the stack before or after,
and after where that was answered; live weights, log-probabilities and weight version of just that
stack; a ledger without a gap that tells of the interruption. A start takes most of the time: about
half a minute a point on two cores. Exit code 1 where something of this does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from patcher.client import Engine
from patcher.engine.stack import Stack
from patcher.errors import PatcherError
from patcher.ledger import replay, verify_chain
from patcher.protocol import LedgerEntry
from tests.engine.patches import random_patch
from tests.engine.server import Server
from tests.engine.tiny import tiny_llama

VICTIMS = ("api", "core", "worker")
PROMPT = "The capital of France is"
REAL = Path(__file__).parents[1] / ".models" / "smollm2-135m-instruct"


@dataclass
class Point:
    """One kill and what was found after it. ``reached``: the last event that was on disk."""

    number: int
    victim: str
    delay: float
    before: list[str]
    after: list[str]
    answered: bool = False
    reached: str = ""
    found: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Torture:
    """An engine that is killed and started again. ``seed`` fixes victims, delays and changes."""

    def __init__(self, model: Path, folder: Path, seed: int, layers: tuple[int, ...]) -> None:
        self.server = Server(model, folder / "server", "--enforce-eager")
        self.patches = [random_patch(model, n, layers=layers, scale=20.0) for n in (1, 2)]
        self.draw = random.Random(seed)
        self.references: dict[tuple[str, ...], object] = {}
        self.takes = 0.0  # seconds of a change

    def begin(self) -> None:
        """Start the engine, and note what it says under each stack that a change may lead to."""
        self.server.start()
        took = []
        with self._engine() as engine:
            for patch in self.patches:
                engine.upload(patch)
            for ids in self._stacks():
                began = time.monotonic()
                engine.set_stack(ids, expect=engine.status()["weight_version"])
                took.append(time.monotonic() - began)
                self.references[tuple(ids)] = self._said()
        self.takes = statistics.median(took)

    def end(self) -> None:
        """Stop the engine."""
        self.server.kill(signal.SIGKILL)

    def point(self, number: int, victim: str) -> Point:
        """Kill ``victim`` in a change, start again, and look."""
        with self._engine() as engine:
            before = engine.status()["stack"]
            last = engine.ledger()[-1]["seq"]
            target = self._victim(engine, victim)
        after = self.draw.choice([ids for ids in self._stacks() if ids != before])
        at = Point(number, victim, self.draw.uniform(0, 1.2 * self.takes), before, after)
        change = threading.Thread(target=self._change, args=(at,))
        change.start()
        time.sleep(at.delay)
        os.kill(target, signal.SIGKILL)
        change.join(60)
        self.server.kill(signal.SIGKILL)
        self.server.start()
        with self._engine() as engine:
            self._look(engine, at, last)
        return at

    def _stacks(self) -> list[list[str]]:
        a, b = (patch.id for patch in self.patches)
        return [[a], [b, a], [b], [a, b], []]

    def _engine(self) -> Engine:
        return Engine(self.server.url, self.server.token)

    def _said(self) -> object:
        choice = self.server.complete(PROMPT, 16)
        return choice["text"], choice["logprobs"]["token_logprobs"]

    def _victim(self, engine: Engine, name: str) -> int:
        assert self.server.process is not None
        api = self.server.process.pid
        workers = [one["pid"] for one in engine.status()["processes"]]
        return {"api": api, "worker": workers[0], "core": _parent(workers[0])}[name]

    def _change(self, at: Point) -> None:
        try:
            with self._engine() as engine:
                engine.set_stack(at.after, expect=Stack(tuple(at.before)).version)
            at.answered = True
        except PatcherError:
            pass

    def _look(self, engine: Engine, at: Point, last: int) -> None:
        status, entries = engine.status(), engine.ledger()
        at.found = status["stack"]
        if at.found not in ([at.after] if at.answered else [at.before, at.after]):
            at.wrong.append("the stack is neither the one before nor the one after")
        if at.answered and at.found != at.after:
            at.wrong.append("what was answered is not there")
        if not engine.verify()["ok"]:
            at.wrong.append("live weights are not those of the stack")
        if status["weight_version"] != status["engine"]["weight_version"]:
            at.wrong.append("another weight version")
        if self._said() != self.references[tuple(at.found)]:
            at.wrong.append("other answers than under that stack")
        at.wrong += broken(entries)
        at.wrong += [f"the ledger contradicts itself at {fault}" for fault in replay(entries)[1]]
        at.reached, told = _story([entry for entry in entries if entry["seq"] > last])
        if not told:
            at.wrong.append("the ledger does not tell of the interruption")


def _parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("PPid:")).split()[1])


def broken(entries: list[LedgerEntry]) -> list[str]:
    """What is wrong with a whole ledger's numbers and hashes."""
    return [f"the ledger breaks at {fault}" for fault in verify_chain(entries)]


def _story(entries: list[LedgerEntry]) -> tuple[str, bool]:
    """The last event of the change, and whether the ledger tells how it ended."""
    events = [entry["event"] for entry in entries if entry["event"].startswith("change-")]
    reached = next((e for e in reversed(events) if e != "change-interrupted"), "nothing")
    return reached, not events or events[-1] != "change-intent"


def run(model: Path, layers: tuple[int, ...], numbers: range, seed: int) -> list[Point]:
    """Torture one engine at the points ``numbers``."""
    with tempfile.TemporaryDirectory() as folder:
        torture = Torture(model, Path(folder), seed, layers)
        points = []
        try:
            torture.begin()
            for number in numbers:
                points.append(torture.point(number, VICTIMS[number % len(VICTIMS)]))
                _tell(points[-1])
        finally:
            torture.end()
    return points


def _tell(at: Point) -> None:
    end = "; ".join(at.wrong) or ("after" if at.found == at.after else "before")
    answered = "answered" if at.answered else "cut off"
    print(
        f"{at.number:4} {at.victim:6} {at.delay:6.3f} s  {at.reached:14} {answered:9} {end}",
        file=sys.stderr,
        flush=True,
    )


def main() -> int:
    """Run, tell, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=170, help="on the tiny model")
    parser.add_argument("--real", type=int, default=30, help="on the real model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    points: list[Point] = []
    with tempfile.TemporaryDirectory() as folder:
        if args.points:
            tiny = tiny_llama(Path(folder) / "model")
            points += run(tiny, (0, 3), range(args.points), args.seed)
    if args.real:
        numbers = range(args.points, args.points + args.real)
        points += run(REAL, (3, 4, 5), numbers, args.seed + 1)
    bad = [point for point in points if point.wrong]
    checks = [{"name": "points", "value": len(points), "bar": args.points + args.real}]
    checks += [{"name": "violations", "value": len(bad), "bar": 0}]
    for check in checks:
        check["ok"] = check["value"] == check["bar"]
    told = Counter((p.victim, p.reached, p.found == p.after) for p in points)
    summary = [
        {"victim": v, "reached": r, "ended": "after" if done else "before", "points": n}
        for (v, r, done), n in sorted(told.items())
    ]
    document = {"seed": args.seed, "checks": checks, "summary": summary}
    if args.json:
        print(json.dumps({**document, "points": [asdict(p) for p in points]}, indent=1))
    else:
        for row in summary:
            print("{victim:7} {reached:14} {ended:7} {points}".format_map(row))
        print(f"{len(points)} points, {len(bad)} violations")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
