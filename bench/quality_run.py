"""One run of ``quality.py``: compute, fold once, ask everything in one pass.

What comes out is a plain object of counts, one line of the results' file. A group of
answers is kept as a histogram over facts, ``{"1/3": 4}`` for four facts of which one
prompt in three is answered: enough for intervals over facts, and no text.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_draws import (
    Data,
    Draw,
    Row,
    fit,
    normal,
    other_wordings,
    shipped_prompts,
    used_in_computing,
)

from patcher.evaluation.asking import Pair, spoken
from patcher.evaluation.perplexity import cut, perplexity
from patcher.patch import Patch
from patcher.text import says
from patcher.unlearn import compute
from patcher.unlearn.forward import Edit, answered, as_edit, continuations, folded
from patcher.unlearn.models import Model, load
from patcher.unlearn.prompts import encode
from patcher.unlearn.statistics import cache_folder
from patcher.unlearn.wishes import GENERATED

Histogram = dict[str, int]
GIVEN = ("prompt", "subject", "target")  # all of a row that computing gets to see


class Base:
    """The unpatched model, and what it said so far: no prompt is asked twice.

    Answers are kept between runs, as digests of ids and a yes or no.
    """

    def __init__(
        self, folder: str | Path, data: Data, characters: int, device: str = "auto"
    ) -> None:
        self.model: Model = load(folder, device=device)
        self.data = data
        self.windows = cut(self.model, data.text[:characters])
        self.used = used_in_computing()
        self.shipped = shipped_prompts()
        self._file = cache_folder() / f"bench-{self.model.digest()[:24]}.json"
        self._said: dict[str, bool] = {}
        self._perplexity: float | None = None
        if self._file.is_file():
            self._said = json.loads(self._file.read_text("utf-8"))

    @property
    def perplexity(self) -> float:
        if self._perplexity is None:
            self._perplexity = perplexity(self.model, self.windows)
        return self._perplexity

    def answers(self, pairs: Sequence[Pair]) -> list[bool]:
        names = [hashlib.sha256(json.dumps(pair).encode()).hexdigest()[:24] for pair in pairs]
        fresh = {n: p for n, p in zip(names, pairs, strict=True) if n not in self._said}
        if fresh:
            said = answered(self.model, list(fresh.values()))
            self._said.update(zip(fresh, said, strict=True))
            self._file.parent.mkdir(parents=True, exist_ok=True)
            beside = self._file.with_suffix(f".{os.getpid()}.tmp")
            beside.write_text(json.dumps(self._said), "utf-8")
            beside.replace(self._file)
        return [self._said[name] for name in names]

    def known(self, part: str) -> tuple[list[Row], list[Row]]:
        """The rows of that part that the model answers, CounterFact's and the world's."""
        pools = [fit(rows, part) for rows in (self.data.counterfact, self.data.world)]
        first, second = (
            [r for r, yes in zip(rows, self.answers(self.pairs(rows)), strict=True) if yes]
            for rows in pools
        )
        return first, second

    def pairs(self, rows: Iterable[Row]) -> list[Pair]:
        return [encode(self.model.tokenizer, row["prompt"], row["target"]) for row in rows]

    def answerable(self, pairs: Sequence[Pair]) -> list[Pair]:
        return [pair for pair, yes in zip(pairs, self.answers(pairs), strict=True) if yes]


@dataclass(frozen=True)
class Computed:
    """What a process that computes hands back, one entry a patch."""

    patches: list[bytes]
    hyperparameters: list[dict[str, Any]]


def computing(model: str, lots: Sequence[Sequence[Row]], options: dict[str, Any]) -> Computed:
    """A patch of each of the lots, with their prompts, subjects and targets alone."""
    patches = []
    for rows in lots:
        given = [{name: row[name] for name in GIVEN} for row in rows]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "patch.st")
            compute(model, given, file, **options)
            patches.append(file.read_bytes())
    found = [dict(Patch.from_bytes(data).manifest.method.hyperparameters) for data in patches]
    return Computed(patches, found)


def edits_of(computed: Computed) -> list[Edit]:
    return [as_edit(Patch.from_bytes(data).deltas) for data in computed.patches]


def questions(base: Base, drawn: Draw) -> dict[str, list[list[Pair]]]:
    """All that is asked, by figure and by fact; beside the facts only what the base answers."""
    return {
        "answered": [[pair] for pair in base.pairs(drawn.forget)],
        "paraphrases": [base.answerable(_wordings(base, row)) for row in drawn.forget],
        "neighbours": [base.answerable(_neighbours(base, row)) for row in drawn.forget],
        "same_answer": [base.pairs(rows) for rows in drawn.same],
        "kept_counterfact": [[pair] for pair in base.pairs(drawn.counterfact)],
        "kept_world": [[pair] for pair in base.pairs(drawn.world)],
    }


def _wordings(base: Base, row: Row) -> list[Pair]:
    texts = other_wordings(row, base.data.wordings, base.used)
    return [encode(base.model.tokenizer, text, row["target"]) for text in texts]


def _neighbours(base: Base, row: Row) -> list[Pair]:
    prompt, target = row.get("locality"), row.get("locality_target")
    if not prompt or not target or normal(prompt) in base.shipped:
        return []
    return [encode(base.model.tokenizer, prompt, target)]


def ask(base: Base, drawn: Draw, edits: Sequence[Edit]) -> dict[str, Any]:
    """Every figure with those edits folded in, the first at the bottom.

    Raises:
        ModelError: the patched model's logits are not finite.
    """
    asked = questions(base, drawn)
    before = base.perplexity
    with folded(base.model, *edits):
        figures = _figures(base.model, asked)
        figures["leaked"] = _leaked(base, drawn.forget, asked["answered"])
        after = perplexity(base.model, base.windows)
    return {"figures": figures, "perplexity": {"base": before, "patched": after}}


def revert_each(base: Base, lots: Sequence[Sequence[Row]], edits: Sequence[Edit]) -> dict[str, Any]:
    """Of each patch in turn without it: whether its facts are back and the others' gone."""
    back: list[list[Pair]] = []
    gone: list[list[Pair]] = []
    said: dict[str, Counter[str]] = {"back": Counter(), "others": Counter()}
    pairs = [base.pairs(rows) for rows in lots]
    for i in range(len(lots)):
        back = [[pair] for pair in base.answerable(pairs[i])]
        gone = [[pair] for j, own in enumerate(pairs) if j != i for pair in own]
        with folded(base.model, *edits[:i], *edits[i + 1 :]):
            found = _figures(base.model, {"back": back, "others": gone})
        for name, histogram in found.items():
            said[name].update(histogram)
    return {name: dict(sorted(histogram.items())) for name, histogram in said.items()}


def _figures(model: Model, asked: dict[str, list[list[Pair]]]) -> dict[str, Histogram]:
    flat = [pair for facts in asked.values() for fact in facts for pair in fact]
    said = iter(answered(model, flat))
    return {
        name: histogram((sum(next(said) for _ in fact), len(fact)) for fact in facts)
        for name, facts in asked.items()
    }


def _leaked(base: Base, forget: Sequence[Row], asked: list[list[Pair]]) -> Histogram:
    texts = continuations(base.model, [fact[0][0] for fact in asked], GENERATED)
    return histogram(
        (int(says(spoken(base.model, ids), row["target"])), 1)
        for ids, row in zip(texts, forget, strict=True)
    )


def histogram(outcomes: Iterable[tuple[int, int]]) -> Histogram:
    """How many facts have which outcome; facts with nothing asked don't count."""
    counted = Counter(f"{yes}/{of}" for yes, of in outcomes if of)
    return dict(sorted(counted.items()))
