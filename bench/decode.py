"""Decoding with patches in force: tokens/s against the unpatched engine, and LoRA's of the same.

Four engines are alive at once, each in a process of its own, and take turns of a few steps
(bench/engines.py): two without the plugin, which show what equal engines differ by here; one with
the plugin, attached, with 0, 1, 16 and 64 random patches of two layers each in force (every layer
from 16 on; the live weights are verified before anything is timed); one with vLLM's LoRA path and
an adapter that is the same delta (``B = L``, ``A = R W``). A turn's first step isn't counted: the
caches are another engine's.

A round's ratio is the mean step of the two unpatched engines by the patched one's. Shown are the
median over the rounds and the interval that holds it in 95 of 100 redraws of the rounds
(bootstrap). Held against the bar is, by depth, the geometric mean over the batches, and no single
batch may lie below it beyond doubt.

    python bench/decode.py [--batch 1 8 32] [--depth 0 1 16 64] [--compiled] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from engines import Engine, alive
from load import MODEL, random_patches
from report import Check, Plot, Spread, at_least, document, finish, line, options

from patcher.export import to_peft

QUESTION = "How fast does an engine decode with so many patches in force?"
BAR = 0.99
PLAIN, AGAIN, PATCHED, LORA = "unpatched", "unpatched again", "patched", "LoRA"
STEPS = 3  # counted of each turn
LORA_SHARE = 0.1  # of the time: it is far off, and slow
REDRAWS = 2000
WHY = (
    "Two engines without the plugin differ by {same:.4f} (farthest from 1 of their own ratios) in"
    " this run. A patched module runs the same kernel on a pack of the same size, so what is left"
    " is where the packs lie in memory, and the machine's noise: more seconds tell them apart."
)
Cell = tuple[int, int]  # patches, batch
Seconds = dict[str, list[float]]  # of a step in each round, by engine
Redrawn = npt.NDArray[np.float64]


class Ratio(NamedTuple):
    """Speed against another engine's: the median of the rounds' ratios, and its interval."""

    value: float
    low: float
    high: float
    redrawn: Redrawn


def ratio(peer: Sequence[float], own: Sequence[float]) -> Ratio:
    """How many times the peer's speed, from the seconds of a step in each round."""
    each = np.array(peer) / np.array(own)
    draw = np.random.default_rng(0)
    return _of(float(np.median(each)), np.median(draw.choice(each, (REDRAWS, len(each))), axis=1))


def together(ratios: Sequence[Ratio]) -> Ratio:
    """The geometric mean of ratios that were measured apart."""
    redrawn = np.exp(np.mean([np.log(one.redrawn) for one in ratios], axis=0))
    return _of(math.exp(statistics.mean(math.log(one.value) for one in ratios)), redrawn)


def _of(value: float, redrawn: Redrawn) -> Ratio:
    low, high = np.quantile(redrawn, (0.025, 0.975))
    return Ratio(value, float(low), float(high), redrawn)


def prepare(model: Path, folder: Path, depths: Sequence[int]) -> tuple[list[str], dict[int, str]]:
    """The patches' files, bottom first, and by depth the adapter that is the same delta."""
    patches = random_patches(model, max(depths), 0, scale=0.1)
    paths = [folder / f"{number}.st" for number in range(len(patches))]
    for patch, path in zip(patches, paths, strict=True):
        patch.write(path)
    adapters = {depth: folder / f"adapter-{depth}" for depth in depths if depth}
    for depth, path in adapters.items():
        to_peft(patches[:depth], path, model)
    return list(map(str, paths)), {depth: str(path) for depth, path in adapters.items()}


def turns(engines: Mapping[str, Engine], seconds: float) -> Seconds:
    """The mean step of each engine in each round, one engine after another in every round.

    The order moves on, so that none always follows the same one. LoRA takes a few turns at the end.
    """
    found: Seconds = {name: [] for name in engines}
    names = [name for name in engines if name != LORA]
    began = time.monotonic()
    while time.monotonic() < began + seconds * (1 - LORA_SHARE) or len(found[names[0]]) < 3:
        at = len(found[names[0]]) % len(names)
        for name in [*names[at:], *names[:at]]:
            found[name].append(_turn(engines[name]))
    while time.monotonic() < began + seconds or not found[LORA]:
        found[LORA].append(_turn(engines[LORA]))
    return found


def _turn(engine: Engine) -> float:
    return float(statistics.mean(engine.do("steps", count=STEPS + 1)[1:]))


def measure(
    engines: Mapping[str, Engine], args: argparse.Namespace, folder: Path
) -> dict[Cell, Seconds]:
    """All engines, by depth and batch."""
    paths, adapters = prepare(args.model, folder, args.depth)
    found: dict[Cell, Seconds] = {}
    held = 0
    for depth in sorted(args.depth):
        held = engines[PATCHED].do("apply", paths=paths[held:depth])
        for batch in args.batch:
            for name, engine in engines.items():
                adapter = adapters.get(depth) if name == LORA else None
                engine.do("fill", batch=batch, adapter=adapter)
            found[depth, batch] = turns(engines, args.seconds)
    return found


def compared(seconds: Seconds) -> dict[str, Ratio]:
    """Each engine's speed against the unpatched ones; :data:`AGAIN`: these against each other."""
    plain = [statistics.mean(pair) for pair in zip(seconds[PLAIN], seconds[AGAIN], strict=True)]
    usual = statistics.median(plain)
    return {
        AGAIN: ratio(seconds[PLAIN], seconds[AGAIN]),
        PATCHED: ratio(plain, seconds[PATCHED]),
        LORA: ratio([usual] * len(seconds[LORA]), seconds[LORA]),
    }


def row(cell: Cell, seconds: Seconds, found: Mapping[str, Ratio]) -> dict[str, Any]:
    depth, batch = cell
    rates = {name: round(batch / statistics.median(own), 1) for name, own in seconds.items()}
    return {
        "patches": depth,
        "batch": batch,
        **{f"{name}, tokens/s": rate for name, rate in rates.items() if name != AGAIN},
        "patched / unpatched": round(found[PATCHED].value, 4),
        "interval": f"{found[PATCHED].low:.4f} to {found[PATCHED].high:.4f}",
        "LoRA / unpatched": round(found[LORA].value, 3),
        "unpatched / unpatched": round(found[AGAIN].value, 4),
        "rounds": len(seconds[PLAIN]),
    }


def checks(found: Mapping[Cell, Mapping[str, Ratio]]) -> list[Check]:
    """What is held against the bar."""
    same = [one[AGAIN].value for one in found.values()]
    why = WHY.format(same=max(same, key=lambda value: abs(math.log(value))))
    by_depth = {
        depth: together([one[PATCHED] for (at, _), one in found.items() if at == depth])
        for depth in sorted({depth for depth, _ in found})
    }
    held = [
        at_least(f"patched / unpatched, {depth} patches, all batches", each.value, BAR, why)
        for depth, each in by_depth.items()
    ]
    upper = min(one[PATCHED].high for one in found.values())
    return [*held, at_least("the lowest upper end of a batch's interval", upper, BAR, why)]


def plot(found: Mapping[Cell, Mapping[str, Ratio]], batches: Sequence[int]) -> Plot:
    """Ratios over the number of patches; a spread is the interval."""
    lines = [
        line(
            f"{name}, batch {batch}",
            {at: Spread(*one[name][:3]) for (at, size), one in found.items() if size == batch},
        )
        for name in (PATCHED, LORA)
        for batch in batches
    ]
    return Plot("patches in force", "tokens/s, unpatched = 1", lines, BAR, "")


def wanted(args: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """The engines, each with its ``VLLM_PLUGINS`` and options."""
    shared: dict[str, Any] = {"model": str(args.model), "enforce_eager": not args.compiled}
    if args.device == "cuda":
        shared["gpu_memory_utilization"] = 0.2  # all four lie on one GPU
    return {
        PLAIN: ("", shared),
        AGAIN: ("", shared),
        PATCHED: ("patcher", {**shared, "patched": True}),
        LORA: ("", {**shared, "enable_lora": True, "max_lora_rank": args.lora_rank}),
    }


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--depth", type=int, nargs="+", default=[0, 1, 16, 64])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each depth and batch")
    parser.add_argument("--lora-rank", type=int, default=32, help="the most that LoRA is to hold")
    parser.add_argument("--compiled", action="store_true", help="vLLM's default; starts slower")
    args = parser.parse_args()
    if args.quick:
        args.depth = [0, 64]
    with tempfile.TemporaryDirectory() as name, alive(wanted(args), Path(name)) as engines:
        seconds = measure(engines, args, Path(name))
    found = {cell: compared(own) for cell, own in seconds.items()}
    rows = [row(cell, seconds[cell], found[cell]) for cell in seconds]
    notes = [
        f"{'compiled' if args.compiled else 'eager'}; LoRA runs eager on CPUs whatever is asked;"
        f" its adapters need at most rank {args.lora_rank}. 0 patches: plugin and LoRA loaded, idle"
    ]
    found_all = document(
        QUESTION, rows, checks(found), args, plot=plot(found, args.batch), notes=notes
    )
    return finish(found_all, args)


if __name__ == "__main__":
    sys.exit(main())
