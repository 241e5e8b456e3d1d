"""Compute, check as it will be served, and again for what misses a bar.

What a further attempt asks for (docs/methods.md, "Verified edits"): of facts that are
still answered, goals further off, and from the second one on layers of their own; where
other knowledge suffers, more guard and goals that are less far.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..errors import InvalidPatchError, NumericalError
from .bars import Bars, Reached, missed, rank
from .check import Check, Figures, Found, check
from .job import Job, Outcome
from .journal import Journal
from .registry import Entry

ATTEMPTS = 4  # at most
FURTHER = 3.0  # nats that a survivor's goals move by one attempt
MORE_LAYERS = 2  # that one attempt adds for the survivors
GUARDED = 4.0  # the guard's factor of one attempt
NEARER = 1.0  # nats that all goals come nearer where only other knowledge suffers
NEAREST = -4.0  # log-odds: an answer's first token at less than one in fifty

linalg: Any = torch.linalg  # its types leave the error out
_FORGETTING = ("max_efficacy", "max_leaked", "max_generalization")


@dataclass(frozen=True)
class Tried:
    """The best attempt: what it was asked, what it made, what was measured of it.

    ``attempts``: how many there were. ``journals``: what they kept to go on from, until
    :meth:`settle`.
    """

    job: Job
    outcome: Outcome
    found: Found
    reached: Mapping[str, Reached]
    attempts: int
    journals: Sequence[Journal] = ()

    def settle(self) -> None:
        """The patch is where it belongs: nothing is left to go on from."""
        for journal in self.journals:
            journal.clear()


def attempt(
    job: Job,
    entry: Entry,
    asked: Check,
    base: Figures,
    known: Sequence[bool],
    bars: Bars,
    *,
    resume: bool,
) -> Tried:
    """Run a method until all bars hold; the best attempt where none does.

    A method that heeds nothing of a further attempt runs once.

    Args:
        job: of the first attempt.
        entry: the method.
        asked: what the check asks.
        base: figures of the unpatched model.
        known: which facts it answers.
        bars: maybe none.
        resume: go on from what an interrupted run of the same left.

    Raises:
        NumericalError: a method ended in numbers that are not finite.
    """
    run = entry.load()
    again = entry.repeats and not (job.settings.as_published or job.settings.orthogonal)
    best: Tried | None = None
    journals: list[Journal] = []
    for turn in range(ATTEMPTS if again else 1):
        job = replace(job, journal=_journal(job, entry.name), conditions={})
        journals.append(job.journal)
        if not resume:
            job.journal.clear()
        torch.manual_seed(job.settings.seed)
        try:
            outcome = run(job)
        except linalg.LinAlgError:
            raise NumericalError(
                f"The method {entry.name} can't solve for an edit: a system is singular.",
                "Give a longer --reference, or other --layers.",
            ) from None
        except InvalidPatchError as error:
            raise NumericalError(error.message, "Try other --layers or another --method.") from None
        found = check(job, outcome.deltas, asked, base, known)
        reached = bars.reached(found.shares)
        if best is None or rank(reached) < rank(best.reached):
            best = Tried(job, outcome, found, reached, turn + 1)
        best = replace(best, attempts=turn + 1, journals=journals)
        names = missed(reached)
        if not names:
            break
        job = _asking_more(job, found, names, turn)
    assert best is not None
    return best


def _asking_more(job: Job, found: Found, names: Sequence[str], turn: int) -> Job:
    """The next attempt, after that number ``turn`` from 0 missed those bars."""
    settings, model = job.settings, job.model
    survivors: set[int] = set()
    if "max_efficacy" in names:
        survivors |= set(found.survivors)
    if "max_leaked" in names:
        survivors |= set(found.leaking)
    if "max_generalization" in names:
        survivors |= set(found.worded)
    firm = dict(job.firmer) | {i: job.firmer.get(i, 0.0) + FURTHER for i in sorted(survivors)}
    extra = job.extra_layers
    if survivors and turn > 0:
        extra += further_layers((*settings.layers, *extra), model.layers, MORE_LAYERS)
    if any(name not in _FORGETTING for name in names):
        nearer = settings.goal if survivors else min(settings.goal + NEARER, NEAREST)
        settings = replace(settings, guard=settings.guard * GUARDED, goal=nearer)
    return replace(job, settings=settings, firmer=firm, extra_layers=extra)


def further_layers(used: Sequence[int], layers: int, count: int) -> tuple[int, ...]:
    """The next layers above those in use, below them where there are no more above."""
    above = [layer for layer in range(max(used) + 1, layers) if layer not in used]
    below = [layer for layer in range(max(used), -1, -1) if layer not in used]
    return tuple((above + below)[:count])


def _journal(job: Job, method: str) -> Journal:
    """Where intermediate results of exactly this attempt are kept."""
    depends = {
        "model": job.model.digest(),
        "method": method,
        "settings": asdict(job.settings),
        "facts": [fact.canonical() for fact in job.facts],
        "augmented": [[list(one) for one in own] for own in job.augmented],
        "text": [list(window) for window in job.text],
        "probes": [list(probe) for probe in job.probes],
        "retained": [list(one) for one in job.retained],
        "earlier": [list(one) for one in job.earlier.encoded],
        "firmer": sorted(job.firmer.items()),
        "extra_layers": job.extra_layers,
        "computed": job.model.computed_on,
    }
    name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
    return Journal(None if job.cache is None else job.cache / "jobs" / name)
