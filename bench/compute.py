"""How long computing takes and how much memory, against the published way.

    python bench/compute.py --data DIR            1 to 50 facts, a quarter of an hour alone
    python bench/compute.py --quick               10 facts, one optimisation of the four
    python bench/compute.py --json                the same as one document, with its checks

Three things, each in a process of its own, all in one run:

published  target values fact after fact, 25 full passes at most, six prompts a fact, four
           optimisations (to say nothing, and the true answer's in three layers) at the
           learning rate 0.1: what ZeroUnlearn's authors' code does. Measured on a few
           facts, then scaled: it is linear in them.
batched    the same four optimisations for all facts at once, from the edited layer up,
           at patcher's rate, which reaches the end of text more often.
zero       all of ``patcher.compute`` with its defaults: loading, statistics of the facts'
           wordings, values, checks. What is computed once a model and kept (the moments
           of the text that ships) is there already.

Quality of the first two: of how many facts the model, with the value put in, ends its
text where it gave the answer.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from apart import Apart, apart, machine
from quality_draws import Row, draw, read, shipped_subjects
from quality_run import Base, computing

from patcher.unlearn import targets
from patcher.unlearn.facts import read_facts
from patcher.unlearn.forward import answered
from patcher.unlearn.job import Job, Settings
from patcher.unlearn.layers import by_depth
from patcher.unlearn.models import load
from patcher.unlearn.progress import Silent
from patcher.unlearn.prompts import encode_facts
from patcher.unlearn.targets import Passes, values
from patcher.unlearn.upward import added

ROOT = Path(__file__).resolve().parents[1]
TIMES_BATCHED, TIMES_ZERO = 50.0, 20.0  # faster than the published way
PUBLISHED_RATE = 0.1  # of the authors' settings
FACTS = 50  # from which on those two count
LINEAR = 1.15  # seconds a fact may grow by that from one number of facts to the next


class Sought(NamedTuple):
    """What seeking target values took. ``ended``: facts whose answer became the text's end."""

    seconds: float
    steps: int
    ended: int
    facts: int


def seek(model: str, rows: Sequence[Row], batched: bool, quick: bool) -> Sought:
    """The values that ``zero --as-published`` needs: to say nothing, and of the true answers.

    ``quick``: the former alone.
    """
    loaded = load(model)
    facts = read_facts(rows)
    coded = encode_facts(loaded.tokenizer, facts)
    layers = by_depth(loaded.layers)
    settings = Settings(tuple(layers), target="eos")
    job = Job(loaded, facts, coded, settings, (), (), None, Silent())
    passes = Passes()
    if not batched:
        targets.RATE = PUBLISHED_RATE  # this process does nothing else
    begun = time.monotonic()
    change = values(job, layers[-1], batched=batched, passes=passes)
    for layer in layers if not quick else ():
        values(job, layer, batched=batched, said=[one.answer for one in coded], passes=passes)
    seconds = time.monotonic() - begun
    end = [loaded.tokenizer.eos_token_id]
    ended = 0
    for i, one in enumerate(coded):
        with (
            torch.no_grad(),
            added(loaded, layers[-1], change[i : i + 1], torch.tensor([one.subject])),
        ):
            ended += answered(loaded, [(one.prompt, end)])[0]
    return Sought(seconds, passes.steps, ended, len(rows))


def weights(model: str) -> int:
    """Bytes of the model's weights in float32, as they are held."""
    network = load(model).network
    return sum(p.numel() * 4 for p in {id(p): p for p in network.parameters()}.values())


def line(
    way: str, facts: int, seconds: float, took: Apart, held: int, **more: Any
) -> dict[str, Any]:
    return {
        "way": way,
        "facts": facts,
        "seconds": round(seconds, 2),
        "seconds_a_fact": round(seconds / facts, 3),
        "peak_bytes": took.peak,
        "peak_beyond_weights": took.peak - took.resting - held,
        **more,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All lines, told on standard error as they come."""
    base = Base(args.model, read(args.data), 1000)
    pools = base.known("all")
    counts = sorted(set(args.facts))
    rows = {n: draw(*pools, n, args.seed, shipped_subjects()).forget for n in counts}
    del base
    held = apart(weights, args.model).result
    lines: list[dict[str, Any]] = []

    def tell(one: dict[str, Any]) -> None:
        lines.append(one)
        print(json.dumps(one), file=sys.stderr, flush=True)

    few = rows[counts[-1]][: args.published]
    took = apart(seek, args.model, few, False, args.quick)
    found: Sought = took.result
    tell(line("published", len(few), found.seconds, took, held, **told(found)))
    # The batched way on the same few facts, so that both qualities are of the same ones.
    same = apart(seek, args.model, few, True, args.quick).result
    lines[-1]["batched_ended"] = same.ended
    for n in counts:
        took = apart(seek, args.model, rows[n], True, args.quick)
        found = took.result
        tell(line("batched", n, found.seconds, took, held, **told(found)))
    with tempfile.TemporaryDirectory() as folder:
        # Quick takes the user's own cache, and fills it the first time.
        options = {} if args.quick else {"cache": folder}
        if not args.quick:
            apart(computing, args.model, [rows[counts[0]]], options)
        for n in counts:
            took = apart(computing, args.model, [rows[n]], options)
            tell(line("zero", n, took.seconds, took, held))
    return {
        "model": Path(args.model).name,
        "machine": machine(),
        "weights_bytes": held,
        "lines": lines,
        "optimisations": 1 if args.quick else 4,
        "checks": checks(lines, args.quick),
    }


def told(found: Sought) -> dict[str, Any]:
    return {"steps": found.steps, "ended": found.ended}


def checks(lines: Sequence[dict[str, Any]], quick: bool) -> list[dict[str, Any]]:
    """What has to hold, and whether it does; ``ok`` is None where the bar is of more facts.

    ``quick`` leaves the default out: one optimisation is no measure for all that it does.
    """
    by_way = {
        way: sorted((one for one in lines if one["way"] == way), key=lambda one: int(one["facts"]))
        for way in ("published", "batched", "zero")
    }
    published = by_way["published"][0]
    found = []
    for way, bar in (("batched", TIMES_BATCHED), ("zero", TIMES_ZERO)):
        last = by_way[way][-1]
        times = published["seconds_a_fact"] / max(last["seconds_a_fact"], 1e-9)
        name = f"{way}: times faster than the published way at {last['facts']} facts"
        if not (quick and way == "zero"):
            enough = last["facts"] >= FACTS and not quick
            found.append(_check(name, times, bar, times >= bar if enough else None))
        each = [one["seconds_a_fact"] for one in by_way[way]]
        growth = max((b / max(a, 1e-9) for a, b in pairwise(each)), default=0.0)
        name = f"{way}: growth of seconds a fact, from one number of facts to the next"
        found.append(_check(name, growth, LINEAR, growth <= LINEAR))
    name = f"batched: facts ended as the published way ends them, of {published['facts']}"
    ended = published["batched_ended"]
    found.append(_check(name, ended, published["ended"], ended >= published["ended"]))
    return found


def _check(name: str, value: float, bar: float, ok: bool | None) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "bar": bar, "ok": ok}


def show(document: dict[str, Any]) -> None:
    """The document for people."""
    print(f"{document['model']}, {document['machine']}")
    print(f"weights in float32: {document['weights_bytes'] / 2**20:,.0f} MiB")
    print(f"{'way':<10}{'facts':>6}{'seconds':>10}{'a fact':>9}{'peak MiB':>10}{'beyond':>8}")
    for one in document["lines"]:
        peak, beyond = (one[k] / 2**20 for k in ("peak_bytes", "peak_beyond_weights"))
        print(
            f"{one['way']:<10}{one['facts']:>6}{one['seconds']:>10.1f}"
            f"{one['seconds_a_fact']:>9.2f}{peak:>10,.0f}{beyond:>8,.0f}"
        )
    few = document["lines"][0]["facts"]
    print(f"published: measured on {few} facts; it is linear in them, one after the other")
    print("beyond: the peak beyond the libraries and the weights")
    for check in document["checks"]:
        mark = {True: "ok  ", False: "FAIL", None: "    "}[check["ok"]]
        print(f"{mark} {check['name']}: {check['value']:g} (bar {check['bar']:g})")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / ".models/smollm2-135m-instruct"))
    parser.add_argument("--data", type=Path, default=ROOT / "tests/data")
    parser.add_argument("--facts", type=int, nargs="+", help="default: 1 5 10 20 50; quick: 10")
    parser.add_argument("--published", type=int, help="facts for the published way; 3, quick: 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.facts = args.facts or ([10] if args.quick else [1, 5, 10, 20, 50])
    args.published = args.published or (1 if args.quick else 3)
    document = measure(args)
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        show(document)
    return 0 if all(check["ok"] is not False for check in document["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
