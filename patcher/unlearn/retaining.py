"""What a trained edit is held to: the model's own words where nothing is to change.

Two terms of ``KL(base | edited)``: at the last token of prompts about other subjects, in
the facts' wordings, in others, and those that the owner names, and at every token of pieces
of running text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .forward import batches, hidden, logits, pad
from .job import Job
from .models import Model
from .reference import locate_probes, same_wording
from .training import Row, Term

SAME_WORDING = 320  # prompts in the facts' own wordings, at most sixteen a fact
APART = 160  # prompts in other wordings, and as many of the owner's
PIECE = 64  # tokens of running text that are read together
PIECES = 32  # of them
OTHERS_AT_ONCE = 40  # prompts in a step
PIECES_AT_ONCE = 2


@dataclass(frozen=True)
class Retained:
    """Rows that are to stay, with the base's last hidden states ``[places, d]`` of each."""

    model: Model
    rows: list[Row]
    states: list[torch.Tensor]

    def divergence(self, row: int, scores: torch.Tensor) -> torch.Tensor:
        """``KL(base | edited)``, the mean over the row's judged places, in nats."""
        with torch.no_grad():
            before = logits(self.model, self.states[row]).log_softmax(-1)
        after = scores.log_softmax(-1)
        return (before.exp() * (before - after)).sum(-1).mean()


def retain_terms(job: Job, weight: float, text_weight: float) -> list[Term]:
    """The two terms."""
    job.progress.start("What is to stay", None)
    others = remembered(job.model, _prompts(job))
    text = remembered(job.model, _pieces(job))
    job.progress.finish()
    return [
        Term(others.rows, others.divergence, OTHERS_AT_ONCE, weight),
        Term(text.rows, text.divergence, PIECES_AT_ONCE, text_weight),
    ]


def _prompts(job: Job) -> list[Row]:
    each = max(1, min(16, SAME_WORDING // len(job.facts)))
    # Another seed than the statistics' and the guards': other subjects.
    alike = same_wording(job.facts, job.probes, each, job.settings.seed + 2)
    draw = random.Random(job.settings.seed)
    alike = draw.sample(alike, min(SAME_WORDING, len(alike)))
    apart = draw.sample(list(job.probes), min(APART, len(job.probes)))
    named = draw.sample(list(job.retained), min(APART, len(job.retained)))
    sequences = [*locate_probes(job.model, alike + apart).sequences, *(e.prompt for e in named)]
    return [Row(ids, len(ids) - 1) for ids in sequences]


def _pieces(job: Job) -> list[Row]:
    pieces = [
        list(window[begin : begin + PIECE])
        for window in job.text
        for begin in range(0, len(window), PIECE)
    ]
    pieces = [piece for piece in pieces if len(piece) > 1]
    draw = random.Random(job.settings.seed)
    return [Row(piece, 0) for piece in draw.sample(pieces, min(PIECES, len(pieces)))]


@torch.no_grad()
def remembered(model: Model, rows: Sequence[Row]) -> Retained:
    """Rows with what the model, as it is, makes of them."""
    states: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for group in batches([len(row.ids) for row in rows]):
        found = hidden(model, pad([rows[i].ids for i in group], model.device))
        for own, i in zip(found, group, strict=True):
            states[i] = own[rows[i].start : len(rows[i].ids)].clone()
    return Retained(model, list(rows), states)
