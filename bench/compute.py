"""How long computing takes and how much memory, against the published way.

    python bench/compute.py [--facts 1 5 50 500] [--data DIR] [--quick] [--json] [--device cuda]

Four things, in processes of their own, all in one run:

published   target values fact after fact, 25 full passes at most, six prompts a fact, four
            optimisations (to say nothing, and the true answer's in three layers) at the
            learning rate 0.1: what ZeroUnlearn's authors' code does. Each optimisation is
            measured on other facts, spread over the set, then scaled: it is linear in them.
batched     the same four optimisations for all facts at once, from the edited layer up,
            at patcher's rate, which reaches the end of text more often.
zero        all of ``patcher.compute`` with its defaults: loading, statistics of the facts'
            wordings, values, checks. What is computed once a model and kept (the moments
            of the text that ships) is taken from the user's cache, where it is.
statistics  the pass for the keys' second moments against the bare forward pass over the same
            batches up to the last layer that is asked, round by round; for larger models the
            products of matrices alone, on random tensors of one layer.

Quality of the first two: by how many nats what is to be said is missed. "At its quality": the
batched way's seconds until it leaves no more of the first miss than the published way does at its
end, in each optimisation (of one fact each); where that meets its fact, all of the batched way's.
And of how many facts the model, with the value put in, ends its text where it gave the answer.
Growth: the exponent of seconds in facts, from each number of facts to the next. Quick: few facts,
one optimisation of the four, the small model alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from apart import Apart, apart
from moments_pass import SHARE, Passed, statistics_passes
from quality_draws import Row, draw, read, shipped_subjects
from quality_run import GIVEN, Base
from report import (
    Check,
    Plot,
    Spread,
    at_least,
    at_most,
    document,
    finish,
    options,
)
from report import line as drawn_line
from seeking import OPTIMISATIONS, Sought, seek

from patcher.unlearn import compute
from patcher.unlearn.models import outline

ROOT = Path(__file__).resolve().parents[1]
TIMES_BATCHED, TIMES_ZERO = 50.0, 20.0  # faster than the published way
EQUAL = "batched, at its quality"
#: What profiles of fifty facts show (batched: one thread; the defaults: two).
WHY = {
    EQUAL: "nine tenths of the time are products of matrices, at the rate that the cores"
    " multiply at. Passes already begin at the edited layer and the subject, and facts that are met"
    " are left out: what is left to save is steps (eleven until half the facts end their text)",
    "zero": "of 121 s the passes for the values take 37 (each wish is run anew only where it has"
    " moved: 125 before), trying other wordings 18, asking the edited model after each round 16,"
    " slopes of the guards 10, the check 10, second moments 9, the choice of layers 8: nearly all"
    " of it products of matrices, each pass for something else. Fewer wordings tried, guards or"
    " rounds would save as much as they tell",
    "growth": "more facts need more rounds of values and checks, up to four",
}
FACTS = 50  # from which on those two count
LINEAR = 1.0  # the exponent of growth


def forget(model: str, rows: Sequence[Row], device: str) -> int:
    """All of ``patcher.compute``: how many of the facts are answered afterwards."""
    given = [{name: row[name] for name in GIVEN} for row in rows]
    result = compute(model, given, device=device)
    return int(result.evaluation["answered"])


def weights(model: str) -> int:
    """Bytes of the model's weights in float32, as they are held."""
    network = outline(model).network
    return sum(p.numel() * 4 for p in {id(p): p for p in network.parameters()}.values())


def line(
    way: str, facts: int, seconds: float, took: Apart, held: int, **more: Any
) -> dict[str, Any]:
    return {
        "way": way,
        "facts": facts,
        "seconds": round(seconds, 2),
        "seconds_a_fact": round(seconds / facts, 3),
        "peak_mib": round(took.peak / 2**20),
        "beyond_weights_mib": round((took.peak - took.resting - held) / 2**20),
        **more,
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All lines but the statistics', told on standard error as they come."""
    base = Base(args.model, read(args.data), 1000)
    pools = base.known("all")
    counts = sorted(set(args.facts))
    rows = {n: draw(*pools, n, args.seed, shipped_subjects()).forget for n in counts}
    del base
    held = weights(args.model)
    lines: list[dict[str, Any]] = []

    def tell(one: dict[str, Any]) -> None:
        lines.append(one)
        print(json.dumps(one), file=sys.stderr, flush=True)

    def sought(name: str, own: Sequence[Row], which: Sequence[int]) -> tuple[Sought, Apart]:
        took = apart(seek, args.model, own, name != "published", which, args.device)
        found: Sought = took.result
        more = {"steps": found.steps, "optimisation": which[0] if len(which) == 1 else "all"}
        more |= {"ended": found.ended} if 0 in which else {}
        tell(line(name, len(own), found.seconds, took, held, **more))
        return found, took

    every = OPTIMISATIONS[:1] if args.quick else OPTIMISATIONS
    spread = rows[counts[-1]]
    step = max(1, len(spread) // len(every))
    turns = [(which, spread[i * step % len(spread)]) for i, which in enumerate(every)]
    # A part of the published way, then the other ways, and so on: what else the machine does
    # in the meantime meets them all.
    left: dict[int, float] = {}
    batched: dict[int, tuple[Sought, Apart]] = {}
    for turn, n in enumerate(counts):
        for which, row in turns[turn :: len(counts)]:
            left[which] = sought("published", [row], [which])[0].left(which)
        batched[n] = sought("batched", rows[n], every)
        took = apart(forget, args.model, rows[n], args.device)
        tell(line("zero", n, took.seconds, took, held, answered=took.result))
    sought("batched, the published's", [turns[0][1]], [0])
    for n, (found, took) in batched.items():
        tell(line(EQUAL, n, found.until(left), took, held))
    return lines


def of(lines: Sequence[dict[str, Any]], way: str) -> list[dict[str, Any]]:
    """The lines of that way, by the number of facts."""
    return sorted((one for one in lines if one["way"] == way), key=lambda one: int(one["facts"]))


def published_way(lines: Sequence[dict[str, Any]]) -> float:
    """Seconds that the published way takes for one fact: of all its optimisations."""
    return sum(float(one["seconds_a_fact"]) for one in of(lines, "published"))


def checks(lines: Sequence[dict[str, Any]], passes: Sequence[Passed], quick: bool) -> list[Check]:
    """What has to hold. The bars of fifty facts are judged where there are as many."""
    published = published_way(lines)
    found = []
    for way, bar in ((EQUAL, TIMES_BATCHED), ("zero", TIMES_ZERO)):
        last = of(lines, way)[-1]
        times = published / max(last["seconds_a_fact"], 1e-9)
        if last["facts"] >= FACTS and not quick:
            name = f"{way}: times faster than the published way at {last['facts']} facts"
            found.append(at_least(name, times, bar, WHY[way]))
        growth = [
            math.log(b["seconds"] / a["seconds"]) / math.log(b["facts"] / a["facts"])
            for a, b in pairwise(of(lines, way))
        ]
        name = f"{way}: exponent of its growth with the facts, at most"
        found.append(at_most(name, max(growth, default=0.0), LINEAR, WHY["growth"]))
    theirs = sum(one.get("ended", 0) for one in of(lines, "published"))
    ours = of(lines, "batched, the published's")[0]
    name = f"batched: facts ended, of the published way's {ours['facts']}"
    found.append(at_least(name, ours["ended"], theirs))
    for one in passes:
        name = f"statistics: speed over the bare forward pass, {one.name}"
        found.append(at_least(name, one.ratio.median, SHARE, one.why))
    return found


def plot(lines: Sequence[dict[str, Any]]) -> Plot:
    """Seconds a fact over facts; the published way's, level."""
    each = Spread.of([published_way(lines)])
    counts = [one["facts"] for one in of(lines, "zero")]
    shown = [drawn_line("published", dict.fromkeys(counts, each))]
    for way in ("batched", EQUAL, "zero"):
        points = {one["facts"]: Spread.of([one["seconds_a_fact"]]) for one in of(lines, way)}
        shown.append(drawn_line(way, points))
    return Plot("facts", "seconds a fact", shown, None, "xy")


def notes(lines: Sequence[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    last = of(lines, "batched")[-1]
    times = published_way(lines) / max(last["seconds_a_fact"], 1e-9)
    return [
        f"{Path(args.model).name}, {torch.get_num_threads()} threads; the published way takes"
        f" {published_way(lines):.1f} s a fact"
        + (" for one optimisation of its four" if args.quick else "")
        + f"; the batched way to its own end is {times:.1f} times as fast at {last['facts']} facts",
        "beyond_weights: resident memory at its peak, beyond the libraries and the float32 weights",
        "the larger a set, the more prompts the default checks: other wordings, what is generated,"
        " up to four rounds where answers come back",
        "EasyEdit's MEMIT: not measured. The package on PyPI (easyeditor 0.0.1.dev0, 2023) pins"
        " torch 2.0.1, numpy 1.22.1 and transformers 4.30.1 and can't be installed on Python 3.11",
    ]


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--model", default=str(ROOT / ".models/smollm2-135m-instruct"))
    parser.add_argument("--data", type=Path, default=ROOT / "tests/data")
    parser.add_argument("--facts", type=int, nargs="+", help="default: 1 50; quick: 1 5")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.facts = args.facts or ([1, 5] if args.quick else [1, 50])
    lines = measure(args)
    passes = apart(statistics_passes, args.model, args.device, args.quick).result
    rows = lines + [one.row() for one in passes]
    found = document(
        "How long does computing take, and how much memory?",
        rows,
        checks(lines, passes, args.quick),
        args,
        plot=plot(lines),
        notes=notes(lines, args),
    )
    return finish(found, args)


if __name__ == "__main__":
    sys.exit(main())
