"""Tokens per second of a quantised model: as it is, with room for patches, patched, with a LoRA.

The real model's linear layers are rounded to four bits in groups of 32. Three engines are alive
at once and take turns of a few decoding steps (bench/engines.py): one without patcher; one with
overlays of the given rank, empty and then with a patch of that rank on every layer; one with vLLM's
LoRA path, without and then with an adapter that is the same delta (``B = L``, ``A = R W``). Ratios
are a round's, shown as the median with the least and the most.

    python bench/overlay.py [--rank 64] [--batch 1 8] [--compiled] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from engines import Engine, alive
from load import MODEL, layer_count, random_patch
from peers import write_adapter
from quantise import quantise
from report import Check, Plot, Spread, at_least, document, finish, line, options, ratios

PLAIN, OVERLAID, LORA = "without patcher", "overlaid", "LoRA"
STEPS = 3  # counted of each turn; the one before them finds the caches another engine's
STATES = ("empty", "patched")  # without a patch and an adapter, then with the same delta as either
WHY = (
    "not profiled: either way reads the same factors once a step, so what differs is how the two"
    " small products are called; time one layer of each to see"
)
Seconds = dict[str, list[float]]  # the mean step of each round, by engine
Found = dict[tuple[str, int], Seconds]  # by state and batch


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=7.0, help="of each state and batch")
    parser.add_argument("--compiled", action="store_true", help="vLLM's default; starts slower")
    args = parser.parse_args()
    if args.quick:
        args.seconds = 5.0
    os.environ["PATCHER_OVERLAY_RANK"] = str(args.rank)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(args.model, folder, args.rank)
        with alive(wanted(folder, args), folder) as engines:
            found = measure(engines, folder, args)
    rows, drawn = compared(found)
    lines = [line(part, points) for part, points in drawn.items()]
    plot = Plot("batch", "tokens/s against the model without patcher", lines, 1.0)
    question = "What does an overlay cost, where a quantised weight can't be folded?"
    notes = [
        f"rank {args.rank} on every layer, {'compiled' if args.compiled else 'eager'};"
        " decoding steps alone, no prefill"
    ]
    told = document(question, rows, checks(found), args, plot=plot, notes=notes)
    return finish(told, args)


def prepare(model: Path, folder: Path, rank: int) -> None:
    """The quantised checkpoint, a random patch on it, and the adapter that is the same delta."""
    quantise(model, folder / "quantised", folder / "plain")
    plain = folder / "plain"
    draw = np.random.default_rng(0)
    patch = random_patch(plain, range(layer_count(plain)), draw, rank=rank, scale=0.1)
    patch.write(folder / "patch.st")
    write_adapter(patch, plain, folder / "adapter", rank)


def wanted(folder: Path, args: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """The engines, each with its ``VLLM_PLUGINS`` and options."""
    shared: dict[str, Any] = {
        "model": str(folder / "quantised"),
        "enforce_eager": not args.compiled,
    }
    if args.device == "cuda":
        shared["gpu_memory_utilization"] = 0.25  # all three lie on one GPU
    return {
        PLAIN: ("", shared),
        OVERLAID: ("patcher", {**shared, "patched": True}),
        LORA: ("", {**shared, "enable_lora": True, "max_lora_rank": args.rank}),
    }


def measure(engines: Mapping[str, Engine], folder: Path, args: argparse.Namespace) -> Found:
    """All engines in both states, at every batch."""
    found: Found = {}
    for state in STATES:
        patched = state != "empty"
        if patched:
            engines[OVERLAID].do("apply", paths=[str(folder / "patch.st")])
        for batch in args.batch:
            for name, engine in engines.items():
                adapter = str(folder / "adapter") if patched and name == LORA else None
                engine.do("fill", batch=batch, adapter=adapter)
            found[state, batch] = turns(engines, args.seconds)
    return found


def turns(engines: Mapping[str, Engine], seconds: float) -> Seconds:
    """The mean step of each engine in each round; the order moves on with every round."""
    found: Seconds = {name: [] for name in engines}
    names, began = list(engines), time.monotonic()
    while time.monotonic() < began + seconds or len(found[names[0]]) < 3:
        at = len(found[names[0]]) % len(names)
        for name in [*names[at:], *names[:at]]:
            took = engines[name].do("steps", count=STEPS + 1)[1:]
            found[name].append(statistics.mean(took))
    return found


def compared(found: Found) -> tuple[list[dict[str, Any]], dict[str, dict[int, Spread]]]:
    """The table, and what is drawn: by engine and state the ratio at each batch."""
    rows: list[dict[str, Any]] = []
    drawn: dict[str, dict[int, Spread]] = {}
    for (state, batch), took in found.items():
        for engine, seconds in took.items():
            part = engine if engine == PLAIN else f"{engine}, {state}"
            ratio = ratios(took[PLAIN], seconds)
            if engine != PLAIN:
                drawn.setdefault(part, {})[batch] = ratio
            rows.append(
                {
                    "batch": batch,
                    "engine": part,
                    "tokens/s": batch / statistics.median(seconds),
                    "ratio": ratio.median,
                    "least": ratio.low,
                    "most": ratio.high,
                    "rounds": len(seconds),
                }
            )
    return rows, drawn


def checks(found: Found) -> list[Check]:
    """Speed with the patch against that with the same delta as a LoRA, within each round."""
    return [
        at_least(
            f"overlay against vLLM's LoRA path, batch {batch}",
            ratios(took[LORA], took[OVERLAID]).median,
            1.0,
            WHY,
        )
        for (state, batch), took in found.items()
        if state == STATES[1]
    ]


if __name__ == "__main__":
    sys.exit(main())
