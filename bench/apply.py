"""What a change costs: how long `patcher apply` takes, how long the engine stops, and how long a
streaming client hears nothing.

Eight streams of the real model over contexts of 100, 500 and 2,000 tokens; a patch of rank 10 on
five layers. One after another in every round on the same server: `patcher apply` (the command
itself, under `recompute`), the client's call (under `continue`), a bare reset of vLLM's prefix
cache (what recomputing those contexts costs), vLLM's update of the same tensors in place, vLLM's
reload of the checkpoint. vLLM's LoRA load is on a server of its own, without patcher. The starts
of both servers are what a restart takes.

    python bench/apply.py [--quick] [--json]
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from load import MODEL, REPOSITORY, Server, random_patch, serving
from peers import Vllm, write_adapter, write_tensors
from report import Check, Plot, Spread, at_most, document, finish, line, options
from streams import Streams, random_prompts

from patcher.client import Engine

STREAMS, LAYERS, RANK = 8, range(3, 8), 10
ROUNDS = {100: 2, 500: 1, 2000: 1}
IDLE_ROUNDS = 3
QUIET, SETTLE = 20, 17  # tokens of each stream before a change, and after it
LONGEST_WITH_PEERS = 500  # tokens: beyond, each way of vLLM's takes a minute on two cores
APPLY, CALL, RESET, PREFILL = "patcher apply", "patcher, continue", "bare reset", "prefill"
UPDATE, RELOAD, LORA = "vLLM update in place", "vLLM reload", "vLLM LoRA load"
RESTART = "restart"


@dataclass
class Event:
    """What one way did in one round, in seconds. ``tokens``: of all contexts at the gap."""

    context: int
    way: str
    seconds: float
    gap: float = 0.0
    step: float = 0.0
    tokens: int = 1
    told: dict[str, float] = field(default_factory=dict)

    @property
    def gap_per_token(self) -> float:
        return self.gap / self.tokens


class Scene:
    """A server, and the ways to give it other weights."""

    def __init__(self, server: Server, folder: Path, engine: Engine, vllm: Vllm) -> None:
        self.engine, self.vllm, self.folder = engine, vllm, folder
        self.url = server.url
        self._settings = {"PATCHER_ENGINE": server.url, "PATCHER_TOKEN": server.token}

    def command(self) -> dict[str, float]:
        """`patcher apply`, as a user types it."""
        words = [sys.executable, "-m", "patcher", "apply", str(self.folder / "patch.st"), "--json"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **self._settings}
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return _milliseconds(json.loads(done.stdout))

    def call(self, in_flight: Any = "continue") -> dict[str, float]:
        """The same by the client, in this process."""
        patch = self.folder / "patch.st"
        return _milliseconds(dict(self.engine.apply(patch, in_flight=in_flight)))

    def back(self) -> None:
        self.engine.revert(all=True, in_flight="continue")

    def update(self) -> dict[str, float]:
        return self.vllm.put(self.folder / "tensors")

    def reload(self) -> dict[str, float]:
        return self.vllm.put(MODEL)

    def check_that_peers_work(self) -> None:
        """An update in place that the served pack doesn't see would be no peer."""
        base = self.vllm.first_words()
        self.update()
        updated = self.vllm.first_words()
        self.reload()
        if updated == base or self.vllm.first_words() != base:
            raise SystemExit("vLLM's update in place did not change what is served, or not back")


def _milliseconds(change: Mapping[str, Any]) -> dict[str, float]:
    return {"stop": change["pause_ms"], "change": 1000 * change["seconds"]}


def timed(way: Callable[[], dict[str, float] | None]) -> tuple[float, dict[str, float]]:
    begun = time.monotonic()
    told = way() or {}
    return time.monotonic() - begun, told


def idle(scene: Scene, rounds: int) -> list[Event]:
    """All ways on an engine that has nothing to do."""
    found = []
    for number in range(rounds + 1):
        for name, way, back in (
            (APPLY, scene.command, scene.back),
            (CALL, lambda: scene.call("recompute"), scene.back),
            (UPDATE, scene.update, None),
            (RELOAD, scene.reload, None),
        ):
            seconds, told = timed(way)
            if back:
                back()
            if number:
                found.append(Event(0, name, seconds, told=told))
    return found


def under_load(scene: Scene, context: int, number: int) -> list[Event]:
    """One round at one context: the ways one after another on the same streams."""
    ways: list[tuple[str, Callable[[], dict[str, float] | None]]] = [
        (APPLY, scene.command),
        (CALL, scene.call),
    ]
    if number % 2:
        ways.reverse()  # contexts grow, so nobody is always the first
    if context <= LONGEST_WITH_PEERS:
        ways.insert(number % 2, (RESET, scene.vllm.reset))
        ways += [(UPDATE, scene.update), (RELOAD, scene.reload)]
    prompts = random_prompts(STREAMS, context, seed=1000 * context + number)
    with Streams(scene.url, prompts, tokens=1500) as streams:
        streams.advance(1)
        prefill = max(times[0] for times in streams.times) - streams.begun
        found = [Event(context, PREFILL, prefill, prefill, tokens=STREAMS * context)]
        for name, way in ways:
            found.append(_event(streams, context, name, way))
            if name in (APPLY, CALL):
                scene.back()
    return found


def _event(
    streams: Streams, context: int, name: str, way: Callable[[], dict[str, float] | None]
) -> Event:
    calm = time.monotonic()
    streams.advance(QUIET)
    begun = time.monotonic()
    step = streams.step(calm, begun).median
    seconds, told = timed(way)
    streams.advance(SETTLE)
    gap, at = streams.longest_gap(begun, time.monotonic())
    tokens = STREAMS * context + streams.made(at)
    print(f"{context} {name}: {seconds:.2f} s, gap {gap:.2f} s", file=sys.stderr)
    return Event(context, name, seconds, gap, step, tokens, told)


def lora(folder: Path, contexts: Mapping[int, int], found: list[Event]) -> None:
    """vLLM's LoRA load, on a server without patcher whose engine has room for adapters."""
    begun = time.monotonic()
    words = ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "1"]
    settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "PATCHER_DISABLE": "1"}
    with (
        serving(MODEL, folder / "with LoRA", *words, **settings) as server,
        Vllm(server.url) as vllm,
    ):
        vllm.first_words()
        found.append(Event(0, RESTART, time.monotonic() - begun))
        load = lambda: vllm.load_adapter(folder / "adapter")  # noqa: E731
        for number in range(IDLE_ROUNDS + 1):
            seconds, told = timed(load)
            vllm.drop_adapter()
            if number:
                found.append(Event(0, LORA, seconds, told=told))
        for context, rounds in contexts.items():
            if context > LONGEST_WITH_PEERS:
                continue
            prompts = random_prompts(STREAMS, context, seed=context)
            with Streams(server.url, prompts, tokens=1500) as streams:
                streams.advance(1)
                for _ in range(rounds):
                    found.append(_event(streams, context, LORA, load))
                    vllm.drop_adapter()


def measure(contexts: Mapping[int, int]) -> list[Event]:
    found: list[Event] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        patch = random_patch(MODEL, LAYERS, np.random.default_rng(0), rank=RANK, scale=1.0)
        patch.write(folder / "patch.st")
        write_tensors(patch, MODEL, folder / "tensors")
        write_adapter(patch, MODEL, folder / "adapter", RANK)
        (folder / "plain").mkdir()
        (folder / "with LoRA").mkdir()
        begun = time.monotonic()
        with (
            serving(MODEL, folder / "plain", VLLM_SERVER_DEV_MODE="1") as server,
            Engine(server.url, server.token) as engine,
            Vllm(server.url) as vllm,
        ):
            vllm.first_words()
            found.append(Event(0, RESTART, time.monotonic() - begun))
            scene = Scene(server, folder, engine, vllm)
            scene.check_that_peers_work()
            found += idle(scene, IDLE_ROUNDS)
            for context, rounds in contexts.items():
                for number in range(rounds):
                    found += under_load(scene, context, number)
        lora(folder, contexts, found)
    return found


def rows(found: list[Event]) -> list[dict[str, Any]]:
    keys = dict.fromkeys((event.context, event.way) for event in found)
    table = []
    for context, way in sorted(keys, key=lambda key: key[0]):
        events = [e for e in found if (e.context, e.way) == (context, way)]
        seconds = Spread.of(e.seconds for e in events)
        row: dict[str, Any] = {"context": context or "idle", "way": way, "rounds": len(events)}
        row |= {"seconds": seconds.median, "least": seconds.low, "most": seconds.high}
        for part in sorted({name for e in events for name in e.told}):
            row[f"{part} ms"] = Spread.of(e.told[part] for e in events).median
        if context:
            row["gap s"] = Spread.of(e.gap for e in events).median
            row["step ms"] = 1000 * Spread.of(e.step for e in events).median
            row["tokens"] = Spread.of(e.tokens for e in events).median
        table.append(row)
    return table


def checks(found: list[Event], contexts: Mapping[int, int]) -> list[Check]:
    def of(context: int, way: str) -> list[Event]:
        return [e for e in found if (e.context, e.way) == (context, way)]

    def median(context: int, way: str) -> float:
        return Spread.of(e.seconds for e in of(context, way)).median

    flush = Spread.of(e.told["flush"] for e in found if "flush" in e.told).median
    made = [at_most("call / reload, idle", median(0, CALL) / median(0, RELOAD), 0.1, WHY_CALL)]
    for context in contexts:
        under = f"{context} tokens, 8 streams"
        if of(context, RELOAD):
            ratio = median(context, CALL) / median(context, RELOAD)
            made.append(at_most(f"call / reload, {under}", ratio, 0.1, WHY_CALL))
        for way in (APPLY, CALL):
            step = 1000 * Spread.of(e.step for e in of(context, way)).median
            stop = Spread.of(e.told["stop"] for e in of(context, way)).median
            bar = round(2 * step + flush, 1)
            made.append(at_most(f"stop of {way}, ms, {under}", stop, bar, WHY_STOP))
        peer = RESET if of(context, RESET) else PREFILL
        costs = [Spread.of(e.gap_per_token for e in of(context, w)).median for w in (APPLY, peer)]
        name = f"gap a token of context / that of the {peer}, {under}"
        made.append(at_most(name, costs[0] / costs[1], 1.2, WHY_GAP))
        steps = Spread.of(e.gap / e.step for e in of(context, CALL)).median
        made.append(at_most(f"gap in decode steps, continue, {under}", steps, 2.0, WHY_CONTINUE))
    return made


WHY_CALL = (
    "Each of the five modules is staged in a call of its own between two steps, so under load each"
    " waits for a step; reading a pack of oneDNN's back, which happens twice, takes 8 ms"
    " (bench/verify.py). vLLM reads this small model's 270 MB out of the page cache in a third of a"
    " second, standing still meanwhile. The call grows with the modules that are patched, a"
    " reload with the model: a pack that can be read without multiplying would bring it down here."
)
WHY_STOP = "The stop waits for the step under way, and for the calls that commit and read back."
WHY_GAP = "The engine recomputes what it had; what is beyond that is the stop."
WHY_CONTINUE = (
    "A stop waits for the step under way; then come the exchange, the quick check and the next"
    " step, and the shorter the step, the more of it these are. The measure resolves about a tenth."
)
NOTES = ()


def drawn(found: list[Event]) -> Plot:
    lines = []
    for way in (APPLY, RESET, PREFILL, CALL, UPDATE, RELOAD, LORA):
        points: dict[float, list[float]] = {}
        for event in found:
            if event.context and event.way == way:
                points.setdefault(event.context, []).append(event.gap)
        lines.append(line(way, {x: Spread.of(gaps) for x, gaps in points.items()}))
    return Plot("tokens of each context", "longest gap in a stream, s", lines, log="xy")


def main() -> int:
    args = options(__doc__).parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end, too
    contexts = {100: 1} if args.quick else ROUNDS
    found = measure(contexts)
    return finish(
        document(
            "What does a change cost those who stream?",
            rows(found),
            checks(found, contexts),
            args,
            plot=drawn(found),
            notes=NOTES,
        ),
        args,
    )


if __name__ == "__main__":
    sys.exit(main())
