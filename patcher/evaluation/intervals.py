"""95 % intervals of shares: percentile bootstrap over facts, exact bounds where it has no width.

Efron & Tibshirani 1993, chapter 13 (percentile intervals, whole facts drawn as they
are, so that several prompts of one fact do not count as several facts); Clopper &
Pearson 1934 (exact bounds of a binomial share).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0

Outcome = tuple[int, int]  # of one fact: how many of its prompts, of how many


@dataclass(frozen=True)
class Interval:
    """``low`` to ``high`` in [0, 1]; ``by``: ``bootstrap`` or ``exact``."""

    low: float
    high: float
    by: str


@dataclass(frozen=True)
class Share:
    """``yes`` of ``of`` prompts, over ``facts`` facts; the interval is None where ``of`` is 0."""

    yes: int
    of: int
    facts: int
    interval: Interval | None

    @property
    def fraction(self) -> float | None:
        """The share; None where there was nothing to ask."""
        return self.yes / self.of if self.of else None

    def as_dict(self) -> dict[str, Any]:
        """``yes``, ``of``, ``facts``, ``share`` and ``interval`` (low, high, by)."""
        return {
            "yes": self.yes,
            "of": self.of,
            "facts": self.facts,
            "share": self.fraction,
            "interval": None if self.interval is None else asdict(self.interval),
        }


def share(outcomes: Sequence[Outcome], seed: int = SEED) -> Share:
    """The share of all prompts, with its interval over facts.

    Args:
        outcomes: of each fact, prompts with a yes and prompts asked; facts with none
            asked don't count.
        seed: of the resamples.
    """
    counted = [(yes, of) for yes, of in outcomes if of]
    yes, of = sum(y for y, _ in counted), sum(o for _, o in counted)
    return Share(yes, of, len(counted), interval(counted, seed))


def of_facts(said: Sequence[bool], seed: int = SEED) -> Share:
    """The share of facts, one prompt each."""
    return share([(int(yes), 1) for yes in said], seed)


def interval(outcomes: Sequence[Outcome], seed: int = SEED) -> Interval | None:
    """The 95 % interval; None without facts.

    Facts with equal outcomes are interchangeable, so a resample is one multinomial
    draw over the kinds of outcome. Where all resamples agree (nought or all of them,
    or every fact alike) the exact bounds for that many facts stand in: an interval of
    no width would claim what so few facts can't show.
    """
    if not outcomes:
        return None
    kinds = Counter(outcomes)
    pairs = np.array(list(kinds), dtype=np.float64)
    weights = np.array(list(kinds.values()), dtype=np.float64)
    facts = len(outcomes)
    drawn = np.random.default_rng(seed).multinomial(facts, weights / facts, RESAMPLES)
    shares = (drawn @ pairs[:, 0]) / (drawn @ pairs[:, 1])
    low, high = np.quantile(shares, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    total = float((weights @ pairs[:, 0]) / (weights @ pairs[:, 1]))
    if high - low > 1e-12:
        return Interval(float(low), float(high), "bootstrap")
    # Not a whole number of facts where each has several prompts: the wider one of both.
    low_bound, _ = exact(math.floor(total * facts + 1e-9), facts)
    _, high_bound = exact(math.ceil(total * facts - 1e-9), facts)
    return Interval(low_bound, high_bound, "exact")


def exact(yes: int, of: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % bounds for ``yes`` of ``of`` independent trials."""
    tail = (1 - LEVEL) / 2
    if yes == 0:
        return 0.0, 1 - tail ** (1 / of)
    if yes == of:
        return tail ** (1 / of), 1.0
    low = _solve(lambda p: 1 - _at_most(yes - 1, of, p), tail)
    return low, 1 - _solve(lambda q: _at_most(yes, of, 1 - q), tail)


def _solve(rising: Callable[[float], float], value: float) -> float:
    # Bisection: all that is needed of the beta distribution's quantiles.
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2


def _at_most(yes: int, of: int, p: float) -> float:
    """The chance of at most ``yes`` of ``of`` at a chance of ``p`` each."""
    if p <= 0:
        return 1.0
    if p >= 1:
        return 1.0 if yes >= of else 0.0
    logs = [
        math.lgamma(of + 1)
        - math.lgamma(k + 1)
        - math.lgamma(of - k + 1)
        + k * math.log(p)
        + (of - k) * math.log1p(-p)
        for k in range(yes + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))
