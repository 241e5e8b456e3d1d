"""What a change costs: how long `patcher apply` takes, how long the engine stops, and how long a
streaming client hears nothing.

Eight streams of the real model over contexts of 100, 500 and 2,000 tokens; a patch of rank 10 on
five layers. One after another in every round on the same server: `patcher apply` (the command
itself, under `recompute`), the client's call (under `continue`), a bare reset of vLLM's prefix
cache (what recomputing those contexts costs), vLLM's update of the same tensors in place, vLLM's
reload of the checkpoint. What takes a minute on two cores is left out: vLLM's ways at 2,000 tokens
(the prefill stands for the reset there), the update and LoRA's load at 500. vLLM's LoRA load is on
a server of its own, without patcher. The starts of both servers are what a restart takes.

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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from changes import (
    APPLY,
    CALL,
    LORA,
    NOTES,
    PREFILL,
    RELOAD,
    RESET,
    RESTART,
    UPDATE,
    Event,
    checks,
    drawn,
    rows,
)
from load import MODEL, REPOSITORY, Server, random_patch, serving
from peers import Vllm, write_adapter, write_tensors
from report import document, finish, options
from streams import Streams, random_prompts

from patcher.client import Engine

STREAMS, LAYERS, RANK = 8, range(3, 8), 10
ROUNDS = {100: 2, 500: 1, 2000: 1}
IDLE_ROUNDS = 3
QUIET, SETTLE = 12, 17  # tokens of each stream before a change, and after it
SHORT, MIDDLE = 100, 500  # tokens: up to the one all peers, up to the other those of the bars


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

    def call(self) -> dict[str, float]:
        """The same by the client, in this process, under ``continue``."""
        return _milliseconds(
            dict(self.engine.apply(self.folder / "patch.st", in_flight="continue"))
        )

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
            (CALL, scene.call, scene.back),
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
    if context <= MIDDLE:
        ways.insert(number % 2, (RESET, scene.vllm.reset))
    if context <= SHORT and number == 0:
        ways.append((UPDATE, scene.update))
    if context <= MIDDLE and number == 0:
        ways.append((RELOAD, scene.reload))  # and so the base is back after the update
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
        load = partial(vllm.load_adapter, folder / "adapter")
        for number in range(IDLE_ROUNDS + 1):
            seconds, told = timed(load)
            vllm.drop_adapter()
            if number:
                found.append(Event(0, LORA, seconds, told=told))
        for context, rounds in contexts.items():
            if context > SHORT:
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
