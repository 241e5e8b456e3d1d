"""What a patch does, measured on the weights as they will be served."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .forward import (
    answered,
    as_edit,
    batches,
    continuations,
    folded,
    hidden,
    logits,
    next_tokens,
    pad,
)
from .job import Deltas, Job
from .models import Model
from .progress import Progress
from .prompts import Encoded, encode
from .reference import Probe
from .stacking import Earlier, still_forgotten
from .wishes import GENERATED, leak


@dataclass(frozen=True)
class Check:
    """What the check asks beside the facts; none of it is in the statistics but ``keep``.

    ``text``: windows of ids. ``probes``: prompts about other subjects. ``keep``: the
    owner's facts that are to stay. ``earlier``: what is to stay forgotten.
    """

    text: Sequence[Sequence[int]]
    probes: Sequence[Probe]
    keep: Sequence[Encoded]
    earlier: Earlier = field(default_factory=Earlier)


@dataclass(frozen=True)
class Figures:
    """Counts on one set of weights. ``next_tokens``: what the probes are answered with."""

    answered: int
    leaked: int
    paraphrases: int
    kept: int
    forgotten: int
    nats: float | None
    next_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """Figures before and after, and of how many each."""

    base: Figures
    patched: Figures
    facts: int
    known: int
    paraphrases: int
    kept: int
    earlier: int
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """As the manifest keeps it: counts and ratios, no text."""
        before, after = self.base, self.patched
        same = sum(a == b for a, b in zip(before.next_tokens, after.next_tokens, strict=True))
        rise = None
        if before.nats is not None and after.nats is not None:
            rise = round(math.exp(min(after.nats - before.nats, 700.0)), 5)
        return {
            "dtype": self.dtype,
            "facts": self.facts,
            "known": self.known,
            "answered": after.answered,
            "leaked": {"patched": after.leaked, "of": self.facts, "tokens": GENERATED},
            "paraphrases": {
                "patched": after.paraphrases,
                "base": before.paraphrases,
                "of": self.paraphrases,
            },
            "others_unchanged": {"same": same, "of": len(before.next_tokens)},
            "preserved": {"patched": after.kept, "base": before.kept, "of": self.kept},
            "still_forgotten": {
                "patched": after.forgotten,
                "base": before.forgotten,
                "of": self.earlier,
            },
            "perplexity_ratio": rise,
        }


def check(
    job: Job, deltas: Deltas, asked: Check, known: Sequence[bool], *, progress: Progress
) -> Found:
    """Measure the model without and with the stored deltas, rounded to the served dtype."""
    progress.start("Checking as it will be served", 2)
    wordings = _other_wordings(job)
    base = _figures(job, asked, wordings, False)
    progress.step(1)
    with folded(job.model, as_edit(deltas)):
        patched = _figures(job, asked, wordings, True)
    progress.step(2)
    progress.finish()
    return Found(
        base,
        patched,
        len(job.facts),
        sum(known),
        len(wordings),
        len(asked.keep),
        asked.earlier.given,
        job.model.dtype_name,
    )


def _other_wordings(job: Job) -> list[tuple[list[int], list[int]]]:
    return [
        encode(job.model.tokenizer, wording, fact.target)
        for fact in job.facts
        for wording in fact.other_wordings
    ]


def _figures(
    job: Job, asked: Check, wordings: list[tuple[list[int], list[int]]], patched: bool
) -> Figures:
    model = job.model
    said = answered(model, [(e.prompt, e.answer) for e in job.encoded])
    ids = [model.tokenizer(probe.prompt).input_ids for probe in asked.probes]
    return Figures(
        answered=sum(said),
        leaked=_leaks(job) if patched else 0,
        paraphrases=sum(answered(model, wordings)),
        kept=sum(answered(model, [(e.prompt, e.answer) for e in asked.keep])),
        forgotten=still_forgotten(model, asked.earlier),
        nats=mean_nats(model, asked.text) if asked.text else None,
        next_tokens=tuple(next_tokens(model, ids)),
    )


def _leaks(job: Job) -> int:
    """How many facts' answers turn up in generated text."""
    tokenizer = job.model.tokenizer
    texts = continuations(job.model, [e.prompt for e in job.encoded], GENERATED)
    found = [
        leak(tokenizer, encoded, i, fact.target, texts[i])
        for i, (fact, encoded) in enumerate(zip(job.facts, job.encoded, strict=True))
    ]
    return len(found) - found.count(None)


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
