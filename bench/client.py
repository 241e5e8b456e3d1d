"""The command's start: ``patcher --help`` and ``patcher inspect`` against bare Python.

    python bench/client.py [--quick] [--json]

Each a process of its own, in turn: ``python -c pass``, ``import click``, the three libraries that
reading a patch needs, then commands that someone on call types; ``status`` asks a port where no
engine is. Seconds beyond bare Python are medians of rounds. What looks and changes nothing, and
the help of every command, is also run once to see that it loads no torch, transformers or vLLM.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from report import Check, Plot, Spread, at_most, document, finish, interleaved, line, options

from patcher.cli.root import SECTIONS
from patcher.patch import Base, Delta, Manifest, Method, ModuleBase, Patch, Requests

BEYOND, HEAVY = 0.2, ("torch", "transformers", "vllm")
BARE, LIBRARIES = "python -c pass", "import click, numpy, pydantic.main"
HELD = ("patcher --help", "patcher inspect", "patcher inspect --json")  # against the bar
NOWHERE = ["--engine", "http://127.0.0.1:9", "--token", "none"]  # the port that discards
WATCHED = f"""
import runpy, sys
try:
    runpy.run_module("patcher", run_name="__main__", alter_sys=True)
finally:
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
WHY_HELP = "click, and each command's module for its line of help; a list of those would need none"
WHY = (
    "importing {libraries} alone takes {alone:.3f} s of it in this run; what is left is"
    " patcher's own modules, the manifest's model (pydantic makes its validators at import) and"
    " reading the file. Less needs a manifest that is checked without pydantic"
)


def main() -> int:
    args = options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patch.st"
        example().write(path)
        ways = {name: partial(run, words) for name, words in timed(str(path)).items()}
        took = interleaved(ways, 8 if args.quick else 20)
        loaded = all_heavy(looking(str(path)))
    bare = took[BARE]
    beyond = {
        way: Spread.of(one - other for one, other in zip(seconds, bare, strict=True))
        for way, seconds in took.items()
    }
    rows = [row(way, seconds, beyond[way]) for way, seconds in took.items()]
    points: dict[int, Spread] = dict(enumerate(beyond.values()))
    lines = [line("beyond bare Python", points)]
    plot = Plot("", "seconds", lines, BEYOND, "", [way.replace(" ", "\n", 1) for way in took])
    question = "How long until the command answers, and does it load what it doesn't need?"
    asked = ", ".join(name for name in loaded if not name.endswith(" --help"))
    notes = [f"Asked for what they load: {asked}, and every command's help"]
    found = document(question, rows, checks(beyond, loaded), args, plot=plot, notes=notes)
    return finish(found, args)


def timed(path: str) -> dict[str, list[str]]:
    """The ways that are compared, as Python's arguments."""
    inspect = ["-m", "patcher", "inspect", path]
    return {
        BARE: ["-c", "pass"],
        "import click": ["-c", "import click"],
        LIBRARIES: ["-c", LIBRARIES],
        "patcher --help": ["-m", "patcher", "--help"],
        "patcher inspect": inspect,
        "patcher inspect --json": [*inspect, "--json"],
        "patcher status": ["-m", "patcher", "status", *NOWHERE],
    }


def looking(path: str) -> list[list[str]]:
    """Commands that change nothing, as far as they come without an engine."""
    helps = [[name, "--help"] for section in SECTIONS.values() for name in section]
    asking = [[name, *NOWHERE] for name in ("status", "verify", "log")]
    reading = [["inspect", path], ["diff", path, path], ["verify-file", path]]
    return [
        ["--help"],
        ["--version"],
        *helps,
        *reading,
        *asking,
        ["plan", path, *NOWHERE],
        ["methods"],
        ["completion", "bash"],
        ["doctor"],
    ]


def row(way: str, seconds: Sequence[float], beyond: Spread) -> dict[str, Any]:
    spread = Spread.of(seconds)
    return {
        "command": way,
        "seconds": spread.median,
        "least": spread.low,
        "most": spread.high,
        "beyond bare Python": beyond.median,
    }


def checks(beyond: Mapping[str, Spread], loaded: Mapping[str, Sequence[str]]) -> list[Check]:
    """What is held against the bars. ``loaded``: of what is heavy, by command."""
    needs = LIBRARIES.removeprefix("import ")
    why = WHY.format(libraries=needs, alone=beyond[LIBRARIES].median)
    held = [
        at_most(
            f"{way}: seconds over bare Python",
            beyond[way].median,
            BEYOND,
            why if "inspect" in way else WHY_HELP,
        )
        for way in HELD
    ]
    guilty = [name for name, found in loaded.items() if found]
    told = f"commands that load {', '.join(HEAVY)} without need, of {len(loaded)}"
    return [
        *held,
        at_most(told, len(guilty), 0, f"{', '.join(guilty)}: import it where it is used"),
    ]


def run(words: list[str]) -> None:
    subprocess.run([sys.executable, *words], capture_output=True, env=environment())


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": root, "NO_COLOR": "1"}


def all_heavy(commands: Sequence[list[str]]) -> dict[str, list[str]]:
    """By command, what it has loaded of what it has no need for."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(heavy, commands)
        return {name_of(words): loads for words, loads in zip(commands, found, strict=True)}


def name_of(words: Sequence[str]) -> str:
    return " ".join(words if words[-1] == "--help" else words[:1])


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
