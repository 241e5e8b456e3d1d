"""Target values by the published way and by patcher's, with their courses: for compute.py."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from quality_draws import Row

from patcher.unlearn import targets
from patcher.unlearn.facts import read_facts
from patcher.unlearn.forward import answered
from patcher.unlearn.job import Job, Settings
from patcher.unlearn.layers import by_depth
from patcher.unlearn.models import Model, load
from patcher.unlearn.progress import Silent
from patcher.unlearn.prompts import Encoded, encode_facts
from patcher.unlearn.targets import Passes, values
from patcher.unlearn.upward import added

OPTIMISATIONS = (0, 1, 2, 3)
PUBLISHED_RATE = 0.1  # of the authors' settings


class Sought(NamedTuple):
    """What seeking target values took. ``ended``: facts whose answer became the text's end.

    ``courses``: of each optimisation the seconds before its first step and its steps (when, and
    by how many nats the facts were missed), by group of facts that ran together.
    """

    seconds: float
    steps: int
    ended: int
    facts: int
    courses: dict[int, list[list[tuple[float, float]]]]

    def left(self, which: int) -> float:
        """The share of the first miss that an optimisation left; 0: its facts were met."""
        groups = self.courses[which]
        missed = sum(own[-1][1] for own in groups)
        met = missed < targets.ENOUGH * self.facts
        return 0.0 if met else missed / sum(own[0][1] for own in groups)

    def until(self, shares: Mapping[int, float]) -> float:
        """Seconds, had every optimisation ended once it left no more than that share."""
        spared = 0.0
        for which, groups in self.courses.items():
            for own in groups:
                enough = [at for at, miss in own if miss <= shares[which] * own[0][1]]
                spared += own[-1][0] - enough[0] if enough else 0.0
        return self.seconds - spared


def seek(
    model: str, rows: Sequence[Row], batched: bool, which: Sequence[int], device: str = "cpu"
) -> Sought:
    """The values that ``zero --as-published`` needs: to say nothing, and of the true answers.

    ``which`` of the four optimisations: 0 is the former, 1 to 3 the latter in each layer.
    """
    loaded = load(model, device=device)
    facts = read_facts(rows)
    coded = encode_facts(loaded.tokenizer, facts)
    layers = by_depth(loaded.layers)
    settings = Settings(tuple(layers), target="eos")
    job = Job(loaded, facts, coded, settings, (), (), None, Silent())
    passes, answers = Passes(), [one.answer for one in coded]
    if not batched:
        targets.RATE = PUBLISHED_RATE  # this process does nothing else
    change: torch.Tensor | None = None
    courses: dict[int, list[list[tuple[float, float]]]] = {}
    begun = time.monotonic()
    for one in which:
        passes.courses = courses[one] = []
        if one == 0:
            change = values(job, layers[-1], batched=batched, passes=passes)
        else:
            values(job, layers[one - 1], batched=batched, said=answers, passes=passes)
    seconds = time.monotonic() - begun
    ended = 0 if change is None else _ended(loaded, coded, layers[-1], change)
    return Sought(seconds, passes.steps, ended, len(rows), courses)


def _ended(model: Model, coded: Sequence[Encoded], layer: int, change: torch.Tensor) -> int:
    """After how many facts the model, with the values put in, ends its text."""
    end, count = [model.tokenizer.eos_token_id], 0
    for i, one in enumerate(coded):
        at = torch.tensor([one.subject], device=model.device)
        with torch.no_grad(), added(model, layer, change[i : i + 1], at):
            count += answered(model, [(one.prompt, end)])[0]
    return count
