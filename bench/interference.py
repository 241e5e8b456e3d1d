"""What independent patches do to each other, and how well ``patcher compare`` predicts it.

    python bench/interference.py --data DIR --folder PATCHES      10 patches of 5 facts
    python bench/interference.py --data DIR --folder PATCHES --split alike
    python bench/interference.py --quick                          4 of 2, the tests' facts

Draws facts as ``quality.py`` does, computes a patch of every lot on the base, and folds
them in every way that is asked about: alone, stacked, every one of the stack reverted,
every two together. ``--split alike`` puts facts of one kind into one lot, so that some
pairs of patches are about the like and others are not. Patches stay in the folder and are
taken from there the next time: a new folder for a new version of the method.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_draws import PARTS, Draw, Row, draw, fit, read, shipped_subjects, template

from patcher import Patch, compute
from patcher.patch.compare import Comparison, Pair, compare
from patcher.unlearn.check import mean_nats
from patcher.unlearn.facts import read_facts
from patcher.unlearn.forward import answered, batches, folded, hidden, logits, pad
from patcher.unlearn.interference import statistics_of
from patcher.unlearn.models import Model, load
from patcher.unlearn.prompts import Encoded, encode_facts
from patcher.unlearn.reference import windows
from patcher.unlearn.stacking import edit_of

ROOT = Path(__file__).resolve().parents[1]
ASIDE = 20  # others that every pair is asked for


@dataclass(frozen=True)
class Asked:
    """What is asked of every set of weights: facts by lot, others; and windows of a text."""

    lots: list[list[Encoded]]
    others: list[Encoded]
    third: list[bool]  # of the others: CounterFact's
    text: list[list[int]]


def chosen(model: Model, args: argparse.Namespace) -> tuple[list[list[Row]], Draw, str]:
    """Lots of known facts, with what else is asked."""
    data = read(args.data)

    def known(rows: Sequence[Row]) -> list[Row]:
        rows = fit(rows, args.part)
        coded = encode_facts(model.tokenizer, read_facts(rows))
        said = answered(model, [(one.prompt, one.answer) for one in coded])
        return [row for row, yes in zip(rows, said, strict=True) if yes]

    count = args.patches * args.facts
    drawn = draw(known(data.counterfact), known(data.world), count, args.seed, shipped_subjects())
    rows = random.Random(args.seed).sample(drawn.forget, len(drawn.forget))
    if args.split == "alike":
        rows.sort(key=lambda row: (row.get("relation", ""), template(row)))
        step = args.facts
        lots = [rows[i : i + step] for i in range(0, len(rows) - step + 1, step)]
    else:
        lots = [rows[i :: args.patches] for i in range(args.patches)]
    return lots, drawn, data.text


def patch_of(lot: list[Row], place: Path, args: argparse.Namespace) -> Patch:
    if not place.exists():
        compute(args.model, lot, place, seed=args.seed)
    return Patch.read(place)


@torch.no_grad()
def both(model: Model, facts: Sequence[Encoded]) -> tuple[list[bool], torch.Tensor]:
    """Whether each whole answer is said greedily, and its log-probability ``[facts]`` float64."""
    said, result = [True] * len(facts), torch.zeros(len(facts), dtype=torch.float64)
    whole = [[*fact.prompt, *fact.answer][:-1] for fact in facts]
    for group in batches([len(ids) for ids in whole]):
        states = hidden(model, pad([whole[i] for i in group], model.device))
        for row, i in enumerate(group):
            first, answer = len(facts[i].prompt) - 1, facts[i].answer
            scores = logits(model, states[row, first : first + len(answer)]).log_softmax(-1)
            said[i] = scores.argmax(-1).tolist() == answer
            result[i] = scores[range(len(answer)), answer].double().sum().cpu()
    return said, result


class Bench:
    """The model, the patches, and the answers of every set of patches, asked once each."""

    def __init__(self, model: Model, patches: list[Patch], asked: Asked) -> None:
        self.model, self.patches, self.asked = model, patches, asked
        self.edits = [edit_of(model, patch) for patch in patches]
        self.seen: dict[tuple[int, ...], tuple[list[bool], torch.Tensor]] = {}

    @contextmanager
    def with_patches(self, which: Sequence[int]) -> Iterator[None]:
        with folded(self.model, *(self.edits[i] for i in which)):
            yield

    def lot(self, which: Sequence[int], number: int) -> tuple[list[bool], torch.Tensor]:
        """Of that lot's facts, with the patches ``which`` folded in in that order."""
        return self._asked((*which, -1, number), which, self.asked.lots[number])

    def others(self, which: Sequence[int], count: int | None = None) -> Any:
        """The same of others: of all, or of as many spread over them."""
        step = 1 if count is None else max(1, len(self.asked.others) // count)
        return self._asked((*which, -2, step), which, self.asked.others[::step])

    def _asked(
        self, name: tuple[int, ...], which: Sequence[int], facts: Sequence[Encoded]
    ) -> tuple[list[bool], torch.Tensor]:
        # Asked once: the same sets of patches are looked at from several sides.
        if name not in self.seen:
            with self.with_patches(which):
                self.seen[name] = both(self.model, facts)
        return self.seen[name]

    @cached_property
    def base_nats(self) -> float:
        return mean_nats(self.model, self.asked.text)

    def perplexity(self, which: Sequence[int]) -> float:
        """Over the base's."""
        with self.with_patches(which):
            return math.exp(mean_nats(self.model, self.asked.text) - self.base_nats)

    def stack(self, which: Sequence[int]) -> dict[str, Any]:
        """The usual figures of a stack."""
        facts = [yes for i in which for yes in self.lot(which, i)[0]]
        others = self.others(which)[0]
        groups = {
            name: [yes for yes, cf in zip(others, self.asked.third, strict=True) if cf == is_]
            for name, is_ in (("counterfact", True), ("world", False))
        }
        return {
            "patches": len(which),
            "answered": f"{sum(facts)} of {len(facts)}",
            "kept": f"{sum(others)} of {len(others)}",
            **{f"kept_{name}": f"{sum(said)} of {len(said)}" for name, said in groups.items()},
            "perplexity": round(self.perplexity(which), 5),
        }

    def reverted(self) -> dict[str, Any]:
        """Every patch taken out of the whole stack: its facts come back, the others stay gone."""
        every = range(len(self.patches))
        back: list[bool] = []
        still: list[bool] = []
        for out in every:
            rest = [i for i in every if i != out]
            back += self.lot(rest, out)[0]
            still += [yes for i in rest for yes in self.lot(rest, i)[0]]
        return {
            "back": f"{sum(back)} of {len(back)}",
            "others_answered": f"{sum(still)} of {len(still)}",
        }

    def pair(self, i: int, j: int) -> dict[str, float]:
        """What the patches ``i`` (beneath) and ``j`` do to each other, beyond each alone."""
        returned, moved = 0, []
        for own in (i, j):
            (was, before), (now, after) = self.lot([own], own), self.lot([i, j], own)
            returned += sum(yes and not no for yes, no in zip(now, was, strict=True))
            moved += (after - before).tolist()
        sets: list[list[int]] = [[], [i], [j], [i, j]]
        base, one, other, joint = (self.others(which, ASIDE)[1] for which in sets)
        return {
            "returned": float(returned),
            "moved": float(np.mean(np.abs(moved))),
            "risen": float(np.mean(moved)),
            "beyond_sum": float((joint - one - other + base).abs().mean()),
        }


def predictions(pair: Pair) -> dict[str, float]:
    """Every figure of ``compare``, over the modules: roots of mean squares."""

    def mean(values: Sequence[float | None]) -> float:
        return math.sqrt(sum((v or 0.0) ** 2 for v in values) / max(1, len(values)))

    shared = list(pair.modules.values())
    return {
        "overlap": pair.interference or 0.0,
        "disturbs": mean([v for s in shared for v in (s.first_on_second, s.second_on_first)]),
        "reads": mean([s.reads for s in shared]),
    }


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The rank correlation; ties get their mean rank. None where one side never varies."""

    def ranks(values: Sequence[float]) -> Any:
        array = np.asarray(values, dtype=np.float64)
        return np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array])

    a, b = ranks(first), ranks(second)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 < b.std() else None


def correlations(bench: Bench, compared: dict[str, Comparison]) -> dict[str, Any]:
    """Spearman's coefficient of every prediction with every measured figure, over all pairs."""
    pairs = list(combinations(range(len(bench.patches)), 2))
    measured = [bench.pair(i, j) for i, j in pairs]
    result: dict[str, Any] = {
        "pairs": len(pairs),
        "measured": {
            name: {
                "mean": round(float(np.mean([m[name] for m in measured])), 5),
                "most": round(max(m[name] for m in measured), 5),
            }
            for name in measured[0]
        },
    }
    for metric, comparison in compared.items():
        predicted = [predictions(pair) for pair in comparison.pairs]
        for name in predicted[0]:
            own = [one[name] for one in predicted]
            result[f"{metric} {name}"] = {
                "from": round(min(own), 4),
                "to": round(max(own), 4),
                **{
                    figure: _rounded(spearman(own, [m[figure] for m in measured]))
                    for figure in measured[0]
                },
            }
    return result


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = load(args.model)
    lots, drawn, text = chosen(model, args)
    begun = time.monotonic()
    patches = []
    for number, lot in enumerate(lots):
        name = f"{args.split}-{args.part}-{args.seed}-{args.facts}-{number}of{len(lots)}.st"
        patches.append(patch_of(lot, folder / name, args))
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    others = [*drawn.counterfact, *drawn.world]
    asked = Asked(
        [encode_facts(model.tokenizer, read_facts(lot)) for lot in lots],
        encode_facts(model.tokenizer, read_facts(others)),
        [i < len(drawn.counterfact) for i in range(len(others))],
        windows(model.tokenizer, text, 512, args.tokens),
    )
    bench = Bench(model, patches, asked)
    every = list(range(len(patches)))
    compared = {
        "euclidean": compare(patches),
        "statistics": compare(patches, statistics_of(args.model, patches)),
    }
    return {
        "model": Path(args.model).name,
        "split": args.split,
        "part": args.part,
        "seed": args.seed,
        "facts": [len(lot) for lot in lots],
        "alone": f"{sum(sum(bench.lot([i], i)[0]) for i in every)} answered",
        "two": bench.stack(every[:2]),
        "all": bench.stack(every),
        "reverted": bench.reverted(),
        "prediction": correlations(bench, compared),
    }


def show(found: dict[str, Any]) -> None:
    """The figures as lines."""
    print(f"{found['model']}: {len(found['facts'])} patches, {found['split']}, {found['part']}")
    for name in ("two", "all"):
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in found[name].items()))
    print("one of all reverted: " + ", ".join(f"{k} {v}" for k, v in found["reverted"].items()))
    for name, one in found["prediction"].items():
        print(f"{name}: {one}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / ".models/smollm2-135m-instruct"))
    parser.add_argument("--data", type=Path, default=ROOT / "tests/data")
    parser.add_argument("--folder", type=Path, help="where the patches are kept; none: nowhere")
    parser.add_argument("--patches", type=int, default=10)
    parser.add_argument("--facts", type=int, default=5, help="of each patch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=PARTS, default="unseen")
    parser.add_argument("--split", choices=("mixed", "alike"), default="mixed")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text for perplexity")
    parser.add_argument("--quick", action="store_true", help="4 patches of 2 facts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.patches, args.facts, args.tokens = 4, 2, 2048
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = run(args, folder)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
