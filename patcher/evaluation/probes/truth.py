"""Right against wrong answers (TOFU's truth ratio, Maini et al. 2024, arXiv 2401.06121)."""

from __future__ import annotations

import math
from statistics import fmean, median
from typing import Any, NamedTuple

from ...unlearn.prompts import encode
from ..asking import Judged, fits, judge
from ..intervals import of_facts
from .setting import CanNotAskError, Probe, Setting, both_sides


class Nats(NamedTuple):
    """Mean log-probability of a token: of the right answer, of it in other words, of the
    likeliest wrong answer; and the logarithm of the wrong ones' mean probability."""

    right: float
    restated: float
    likeliest: float
    wrong: float


def _ready(setting: Setting) -> None:
    if not any(asked.row.get("wrong") for asked in setting.facts):
        raise CanNotAskError("no fact has wrong answers beside the right one")


def _look(setting: Setting) -> list[Nats]:
    """Of each fact that has wrong answers."""
    model = setting.model
    pairs, sizes = [], []
    for asked in setting.facts:
        wrong = asked.row.get("wrong")
        if not wrong or asked.fact.prompt is None:
            continue
        restated = (asked.row.get("restated") or "").strip() or asked.fact.target
        answers = [asked.fact.target, restated, *wrong]
        own = [encode(model.tokenizer, asked.fact.prompt, text) for text in answers]
        if not all(fits(model, pair) for pair in own):
            continue
        pairs += own
        sizes.append(len(wrong))
    judged = iter(judge(model, pairs))
    found = []
    for size in sizes:
        right, restated = _nats(next(judged)), _nats(next(judged))
        # A mean of probabilities, as the paper has it, not of their logarithms.
        wrongs = [_nats(next(judged)) for _ in range(size)]
        top = max(wrongs)
        mean = top + math.log(fmean(math.exp(value - top) for value in wrongs))
        found.append(Nats(right, restated, top, mean))
    return found


def _nats(one: Judged) -> float:
    return fmean(one.nats)


def _summary(setting: Setting, found: list[Nats]) -> dict[str, Any]:
    ratios = [math.exp(min(one.wrong - one.restated, 700.0)) for one in found]
    preferred = [one.right > one.likeliest for one in found]
    return {
        "truth_ratio": median(ratios) if ratios else None,
        "right_preferred": of_facts(preferred, setting.seed).as_dict(),
    }


TRUTH = Probe(_ready, _look, both_sides(_summary))
