"""How likely the forgotten answers still are, and where they rank."""

from __future__ import annotations

import math
from statistics import fmean, median
from typing import Any

from ..asking import Judged, judge
from ..intervals import of_facts
from .setting import Probe, Setting, always, both_sides

NEAR = 10  # a rank that a few samples reach


def _look(setting: Setting) -> list[Judged]:
    return judge(setting.model, [asked.pair for asked in setting.facts])


def _probability(setting: Setting, judged: list[Judged]) -> dict[str, Any]:
    whole = [sum(one.nats) for one in judged]
    return {
        "answer": fmean(whole),
        "first_token": fmean(one.nats[0] for one in judged),
        "token": fmean(fmean(one.nats) for one in judged),
        "geometric_mean": math.exp(fmean(whole)),
        "each": whole,
    }


def _rank(setting: Setting, judged: list[Judged]) -> dict[str, Any]:
    first = [one.ranks[0] for one in judged]
    worst = [max(one.ranks) for one in judged]
    return {
        "first_token": median(first),
        "worst_token": median(worst),
        "top_10": of_facts([rank <= NEAR for rank in first], setting.seed).as_dict(),
        "each": first,
    }


PROBABILITY = Probe(always, _look, both_sides(_probability))
RANK = Probe(always, _look, both_sides(_rank))
