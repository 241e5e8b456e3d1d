"""Engines in processes of their own that take a step when they are told to, and else do nothing.

So several can be alive at once and be measured in turns of a few steps, a fraction of a second
each: what else the machine does meets all of them. vLLM's worker is in the engine's process
(``VLLM_ENABLE_V1_MULTIPROCESSING=0``): one in a process of its own spins for a second after
each step and would take a core from the engine whose turn it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from load import REPOSITORY

PROMPT = 8  # tokens of each request: LoRA's prefill is slow on CPUs
_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def _threads() -> dict[str, str]:
    """As vLLM binds the worker of a server on a CPU: all cores but one.

    That one does here what else the machine does; two threads that share a core with
    something else wait for each other a hundred times in a step.
    """
    own = sorted(os.sched_getaffinity(0))[1:] or [0]
    return {"OMP_NUM_THREADS": str(len(own)), "GOMP_CPU_AFFINITY": " ".join(map(str, own))}


class Engine:
    """The parent's hand on one of them."""

    def __init__(self, name: str, plugins: str, options: Mapping[str, Any], folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name.replace(' ', '-')}.log"
        # A cache of its own: vLLM's key for compiled code doesn't know of plugins.
        settings = {"VLLM_PLUGINS": plugins, "VLLM_CACHE_ROOT": str(self._log.with_suffix(""))}
        settings |= _threads()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **_SETTINGS, **settings},
                text=True,
            )

    def ready(self) -> float:
        """Wait until it is up; the seconds that it took from the start of its process."""
        return float(self._answer())

    def do(self, what: str, **how: Any) -> Any:
        """Have a method of :class:`_Driven` called there, and wait for what it returns."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **how}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended:\n{self._log.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def alive(
    wanted: Mapping[str, tuple[str, Mapping[str, Any]]], folder: Path
) -> Iterator[dict[str, Engine]]:
    """Engines by name, each with its ``VLLM_PLUGINS`` and options, started at once."""
    engines: dict[str, Engine] = {}
    try:
        for name, (plugins, options) in wanted.items():
            engines[name] = Engine(name, plugins, options, folder)
        for engine in engines.values():
            engine.ready()
        yield engines
    finally:
        for engine in engines.values():
            engine.close()


class _Driven:
    """The engine in its own process. ``patched``: attach patcher to it."""

    def __init__(self, model: str, *, patched: bool = False, **options: Any) -> None:
        from vllm import LLM

        self._llm = LLM(model, max_model_len=1024, enable_prefix_caching=False, **options)
        self._core = self._llm.llm_engine
        self._count = 0
        if patched:
            import patcher

            self._patcher = patcher.attach(self._llm)

    def apply(self, paths: list[str]) -> int:
        """Put patches on the stack; its depth then, once the live weights are what they must be."""
        if paths:
            self._patcher.apply(*paths)
        if not self._patcher.verify()["ok"]:
            raise SystemExit("the live weights are not what base and stack give")
        return len(self._patcher.status()["stack"])

    def fill(self, batch: int, adapter: str | None = None) -> None:
        """Run ``batch`` requests and no others, each beyond its prompt."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        self._core.abort_request(list(self._core.output_processor.request_states), internal=True)
        params = SamplingParams(temperature=0, max_tokens=1024 - PROMPT, ignore_eos=True)
        lora = None if adapter is None else LoRARequest(adapter, abs(hash(adapter)), adapter)
        for number in range(batch):
            self._count += 1
            prompt = {"prompt_token_ids": [*range(100 + number, 100 + PROMPT + number)]}
            self._core.add_request(str(self._count), prompt, params, lora_request=lora)
        self.steps(3)  # a prefill, and what is computed once

    def steps(self, count: int) -> list[float]:
        """Take so many steps; the seconds of each."""
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            self._core.step()
            seconds.append(time.perf_counter() - began)
        return seconds


def _serve() -> None:
    began = time.perf_counter()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to the log
    driven = _Driven(**json.loads(sys.argv[1]))

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    reply(time.perf_counter() - began)
    for line in sys.stdin:
        wish = json.loads(line)
        reply(getattr(driven, wish.pop("do"))(**wish))


if __name__ == "__main__":
    _serve()
