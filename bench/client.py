"""The command's start: ``patcher --help`` and ``patcher inspect`` against bare Python.

    python bench/client.py [--quick] [--json]

Each a process of its own, in turn: ``python -c pass``, ``python -c "import click"``, then the
commands that someone on call types. Seconds beyond bare Python are medians of rounds. Each
command is also run once to see that it loads no torch, transformers or vLLM.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from report import Plot, Spread, at_most, document, finish, interleaved, line, options

from patcher.patch import Base, Delta, Manifest, Method, ModuleBase, Patch, Requests

BEYOND, HEAVY = 0.2, ("torch", "transformers", "vllm")
LIGHT = (
    ["--help"],
    ["--version"],
    ["apply", "--help"],
    ["compute", "--help"],
    ["status", "--help"],
)
WATCHED = f"""
import runpy, sys
try:
    runpy.run_module("patcher", run_name="__main__", alter_sys=True)
finally:
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
WHY = "the libraries that the command stands on (click, rich, pydantic, numpy) load in that time"


def main() -> int:
    args = options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patch.st"
        example().write(path)
        inspect = ["inspect", str(path)]
        python = [sys.executable]
        ways: dict[str, Callable[[], Any]] = {
            "python -c pass": partial(run, [*python, "-c", "pass"]),
            "import click": partial(run, [*python, "-c", "import click"]),
            "patcher --help": partial(run, [*python, "-m", "patcher", "--help"]),
            "patcher inspect": partial(run, [*python, "-m", "patcher", *inspect]),
            "patcher inspect --json": partial(run, [*python, "-m", "patcher", *inspect, "--json"]),
        }
        took = interleaved(ways, 5 if args.quick else 15)
        loaded = {" ".join(words[:2]): heavy(words) for words in LIGHT}
        loaded["inspect"] = heavy(inspect)
    bare = took["python -c pass"]
    beyond = {
        way: Spread.of(one - other for one, other in zip(seconds, bare, strict=True))
        for way, seconds in took.items()
    }
    rows = [
        {
            "command": way,
            "seconds": Spread.of(seconds).median,
            "least": min(seconds),
            "most": max(seconds),
            "beyond bare Python": beyond[way].median,
        }
        for way, seconds in took.items()
    ]
    checks = [
        at_most(f"{way}: seconds over bare Python", beyond[way].median, BEYOND, WHY)
        for way in took
        if way.startswith("patcher")
    ]
    told = f"commands that load {', '.join(HEAVY)} without need, of {len(loaded)}"
    checks.append(at_most(told, sum(map(bool, loaded.values())), 0))
    points: dict[float, Spread] = dict(enumerate(beyond.values()))
    plot = Plot("; ".join(took), "seconds over bare Python", [line("start", points)], BEYOND, "")
    question = "How long until the command answers?"
    notes = [f"asked for what they load: {', '.join(loaded)}"]
    return finish(document(question, rows, checks, args, plot=plot, notes=notes), args)


def run(words: list[str]) -> None:
    subprocess.run(words, check=True, capture_output=True, env=environment())


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": root, "NO_COLOR": "1"}


def heavy(words: list[str]) -> list[str]:
    """What a command has loaded at its end of what it has no need for."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *words], capture_output=True, text=True, env=environment()
    )
    said = done.stderr.strip().splitlines()[-1]
    return [name for name in HEAVY if f"'{name}'" in said]


def example() -> Patch:
    """A patch of five modules as `compute` makes them: ten facts, some hundreds of kB."""
    draw = np.random.default_rng(0)
    names = [f"model.layers.{n}.mlp.down_proj" for n in range(5)]
    base = ModuleBase(shape=(576, 1536), dtype="bfloat16", digest="0" * 64, blocks=("0" * 64,) * 48)
    manifest = Manifest(
        title="an example",
        created="2026-11-26T00:00:00Z",
        tool="bench",
        base=Base(model="m", architecture="LlamaForCausalLM", modules=dict.fromkeys(names, base)),
        method=Method(name="random", hyperparameters={}),
        requests=Requests(count=10, commitment="0" * 64),
    )
    small = (draw.standard_normal((576, 10)), draw.standard_normal((10, 576)) / 576)
    return Patch.build(manifest, {name: Delta.multiplicative(*small) for name in names})


if __name__ == "__main__":
    sys.exit(main())
