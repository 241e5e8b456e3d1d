"""What a patch does, measured on the weights as they will be served."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import NumericalError
from .facts import Fact, unusable
from .forward import (
    answered,
    as_edit,
    batches,
    folded,
    hidden,
    logits,
    next_tokens,
    pad,
)
from .job import Deltas, Job
from .models import Model
from .prompts import Encoded, encode
from .reference import Probe
from .stacking import Earlier, still_forgotten
from .survivors import leaks
from .wishes import GENERATED

Pair = tuple[list[int], list[int]]  # ids of a prompt and of its answer


@dataclass(frozen=True)
class Check:
    """What the check asks beside the facts; none of it is in the statistics but ``keep``.

    ``text``: windows of ids. ``probes``: prompts about other subjects. ``keep``: the
    owner's facts that are to stay. ``wordings``: of every fact ids of its other wordings,
    each with its answer. ``neighbours``: the facts' neighbouring prompts, with answers that
    are to stay. ``earlier``: what is to stay forgotten.
    """

    text: Sequence[Sequence[int]]
    probes: Sequence[Probe]
    keep: Sequence[Encoded]
    wordings: Sequence[Sequence[Pair]] = ()
    neighbours: Sequence[Pair] = ()
    earlier: Earlier = field(default_factory=Earlier)


@dataclass(frozen=True)
class Figures:
    """What one set of weights answers, one by one: which facts, wordings, neighbours …

    ``leaked`` is asked of patched weights alone, and True before. ``nats``: a token of the
    text. ``next_tokens``: what the probes are answered with.
    """

    answered: tuple[bool, ...]
    leaked: tuple[bool, ...]
    wordings: tuple[tuple[bool, ...], ...]
    neighbours: tuple[bool, ...]
    kept: tuple[bool, ...]
    forgotten: int
    nats: float | None
    next_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """Figures before and after; ``known``: which facts the model answers without the patch."""

    base: Figures
    patched: Figures
    known: Sequence[bool]
    earlier: int
    dtype: str

    @property
    def shares(self) -> dict[str, float | None]:
        """What the bars are measured on, by the bars' names; None: there was nothing to ask.

        Shares are of what the base answers. Specificity is the lower of two: of the facts'
        neighbours, where there are some, and of the probes whose next token is the same.
        """
        before, after = self.base, self.patched
        near = _kept(before.neighbours, after.neighbours)
        others = _share([a == b for a, b in self._tokens])
        both = [share for share in (near, others) if share is not None]
        return {
            "max_efficacy": _kept(self.known, after.answered),
            "max_leaked": _kept(self.known, after.leaked),
            "max_generalization": _kept(_flat(before.wordings), _flat(after.wordings)),
            "min_specificity": min(both) if both else None,
            "max_ppl_ratio": self._rise,
            "min_retained": _kept(before.kept, after.kept),
        }

    @property
    def survivors(self) -> list[int]:
        """Facts that are still answered."""
        return [i for i, yes in enumerate(self.patched.answered) if yes]

    @property
    def leaking(self) -> list[int]:
        """Known facts whose answers turn up in generated text."""
        both = zip(self.known, self.patched.leaked, strict=True)
        return [i for i, (known, yes) in enumerate(both) if known and yes]

    @property
    def worded(self) -> list[int]:
        """Facts of which another wording is still answered."""
        return [i for i, own in enumerate(self.patched.wordings) if any(own)]

    @property
    def _tokens(self) -> list[tuple[int, int]]:
        return list(zip(self.base.next_tokens, self.patched.next_tokens, strict=True))

    @property
    def _rise(self) -> float | None:
        before, after = self.base.nats, self.patched.nats
        if before is None or after is None:
            return None
        return math.exp(min(after - before, 700.0))

    def as_dict(self) -> dict[str, Any]:
        """As the manifest keeps it: counts and ratios, no text."""
        before, after = self.base, self.patched
        wordings, rise = _flat(before.wordings), self._rise
        return {
            "dtype": self.dtype,
            "facts": len(self.known),
            "known": sum(self.known),
            "answered": sum(after.answered),
            "leaked": {"patched": sum(after.leaked), "of": len(self.known), "tokens": GENERATED},
            "paraphrases": {
                "patched": sum(_flat(after.wordings)),
                "base": sum(wordings),
                "of": len(wordings),
            },
            "neighbours": {
                "patched": sum(after.neighbours),
                "base": sum(before.neighbours),
                "kept": sum(_both(before.neighbours, after.neighbours)),
                "of": len(before.neighbours),
            },
            "others_unchanged": {
                "same": sum(a == b for a, b in self._tokens),
                "of": len(self._tokens),
            },
            "preserved": {
                "patched": sum(after.kept),
                "base": sum(before.kept),
                "of": len(before.kept),
            },
            "still_forgotten": {
                "patched": after.forgotten,
                "base": before.forgotten,
                "of": self.earlier,
            },
            "perplexity_ratio": None if rise is None else round(rise, 5),
        }


def _flat(parts: Sequence[Sequence[bool]]) -> list[bool]:
    return [one for part in parts for one in part]


def _both(before: Sequence[bool], after: Sequence[bool]) -> list[bool]:
    """Of what was answered before, what is answered after."""
    return [b for a, b in zip(before, after, strict=True) if a]


def _kept(before: Sequence[bool], after: Sequence[bool]) -> float | None:
    return _share(_both(before, after))


def _share(yes: Sequence[bool]) -> float | None:
    return sum(yes) / len(yes) if yes else None


def unpatched(job: Job, asked: Check) -> Figures:
    """The figures of the model as it is."""
    job.progress.start("Asking the unpatched model", None)
    found = _figures(job, asked, False)
    job.progress.finish()
    return found


def check(job: Job, deltas: Deltas, asked: Check, base: Figures, known: Sequence[bool]) -> Found:
    """Measure the model with the stored deltas, rounded to the served dtype.

    Args:
        base: of :func:`unpatched`.
        known: which facts the model answers without the patch.

    Raises:
        NumericalError: the patched model's outputs are not finite.
    """
    job.progress.start("Checking as it will be served", None)
    with folded(job.model, as_edit(deltas)):
        patched = _figures(job, asked, True)
    job.progress.finish()
    return Found(base, patched, known, asked.earlier.given, job.model.dtype_name)


def wordings_of(
    tokenizer: Any, facts: Sequence[Fact], max_tokens: int | None
) -> tuple[list[list[Pair]], list[Pair]]:
    """Ids of every fact's other wordings, and of all the neighbours that have an answer.

    Raises:
        ForgetSetError: one has more tokens than the model takes: by line and field.
    """
    problems: list[str] = []

    def coded(fact: Fact, name: str, prompt: str, target: str) -> Pair:
        pair = encode(tokenizer, prompt, target)
        count = sum(map(len, pair))
        if max_tokens is not None and count > max_tokens:
            problems.append(
                f"line {fact.line}: {name}: {count} tokens; the model takes {max_tokens}"
            )
        return pair

    wordings = [
        [coded(fact, "another wording", text, fact.target) for text in fact.other_wordings]
        for fact in facts
    ]
    neighbours = [
        coded(fact, "locality", fact.locality, fact.locality_target)
        for fact in facts
        if fact.locality is not None and fact.locality_target is not None
    ]
    if problems:
        raise unusable(problems)
    return wordings, neighbours


def _figures(job: Job, asked: Check, patched: bool) -> Figures:
    model = job.model
    said = iter(answered(model, [pair for own in asked.wordings for pair in own]))
    nats = mean_nats(model, asked.text) if asked.text else None
    if nats is not None and not math.isfinite(nats):
        which = "patched model's" if patched else "model's"
        raise NumericalError(
            f"The {which} outputs on the reference text are not finite.",
            "Compute with other settings." if patched else "Give a sound checkpoint.",
        )
    ids = [model.tokenizer(probe.prompt).input_ids for probe in asked.probes]
    leaked = [wish is not None for wish in leaks(job)] if patched else [True] * len(job.facts)
    return Figures(
        answered=tuple(answered(model, [(e.prompt, e.answer) for e in job.encoded])),
        leaked=tuple(leaked),
        wordings=tuple(tuple(next(said) for _ in own) for own in asked.wordings),
        neighbours=tuple(answered(model, asked.neighbours)),
        kept=tuple(answered(model, [(e.prompt, e.answer) for e in asked.keep])),
        forgotten=still_forgotten(model, asked.earlier),
        nats=nats,
        next_tokens=tuple(next_tokens(model, ids)),
    )


@torch.no_grad()
def mean_nats(model: Model, windows: Sequence[Sequence[int]]) -> float:
    """Mean negative log-probability, in nats, of every token but each window's first."""
    total, count = 0.0, 0
    for group in batches([len(window) for window in windows], 2048):
        parts = [windows[i] for i in group]
        states = hidden(model, pad(parts, model.device))
        for row, window in enumerate(parts):
            ids = torch.tensor(window, device=model.device)
            scores = logits(model, states[row, : len(window) - 1])
            total += float(torch.nn.functional.cross_entropy(scores, ids[1:], reduction="sum"))
            count += len(window) - 1
    return total / count
