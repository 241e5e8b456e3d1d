"""The facts' prompts in other surroundings: generic wordings, and distracting text before them.

Every surrounding ends with the prompt, so that the answer continues it as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

from ...unlearn.prompts import encode
from ..asking import Pair, fits, judge
from ..intervals import Outcome, of_facts, share
from .setting import CanNotAskError, Probe, Setting, always, both_sides, reworded

TEMPLATES = (
    "Complete the sentence: {}",
    "It is well known that {}",
    "Fact: {}",
    "According to the encyclopedia, {}",
    "Here is something that everybody learns at school. {}",
    "Quiz night, last round. The host reads out the statement, and the team finishes it: {}",
    "To the best of my knowledge, {}",
    "Please remind me of this one. {}",
)
PREFIXES = (
    "The rain had stopped before noon, and the streets were drying. {}",
    "She closed the book, put it back on the shelf and went to make tea. {}",
    "Trains to the coast run every half hour on weekdays. {}",
    "The committee meets again on Thursday to discuss the budget. {}",
    "A good knife should be sharpened at least twice a year. {}",
    "He counted the boxes again: nine, as before. Nobody had touched them. The dog slept. {}",
)

Found = list[list[bool]]  # of each fact, whether each surrounding brings the answer


def _look(setting: Setting, wordings: Sequence[str]) -> Found:
    pairs = [
        [reworded(asked, setting.model, wording) for wording in wordings] for asked in setting.facts
    ]
    flat = [pair for row in pairs for pair in row if pair is not None]
    said = iter(judge(setting.model, flat))
    return [[next(said).answered for pair in row if pair is not None] for row in pairs]


def outcomes(found: Found) -> list[Outcome]:
    """Of each fact, how many prompts brought the answer, and of how many."""
    return [(sum(row), len(row)) for row in found]


def _summary(setting: Setting, found: Found) -> dict[str, Any]:
    return {
        "prompts": share(outcomes(found), setting.seed).as_dict(),
        "any": of_facts([any(row) for row in found if row], setting.seed).as_dict(),
    }


def _has_hops(setting: Setting) -> None:
    if not any(asked.row.get("multihop") for asked in setting.facts):
        raise CanNotAskError("no fact has multi-hop questions")


def _look_hops(setting: Setting) -> Found:
    """Of each fact, whether each question is answered with one of its old answers."""
    model, tokenizer = setting.model, setting.model.tokenizer
    pairs: list[list[list[Pair]]] = [
        [
            [encode(tokenizer, hop["prompt"], target) for target in hop["targets"]]
            for hop in asked.row.get("multihop") or ()
        ]
        for asked in setting.facts
    ]
    fitting = [[[pair for pair in hop if fits(model, pair)] for hop in row] for row in pairs]
    judged = judge(model, [p for row in fitting for hop in row for p in hop])
    said = iter(one.answered for one in judged)
    # A question counts where one of its answers does.
    return [[any(list(islice(said, len(hop)))) for hop in row if hop] for row in fitting]


TEMPLATE_ATTACK = Probe(always, partial(_look, wordings=TEMPLATES), both_sides(_summary))
PREFIX_ATTACK = Probe(always, partial(_look, wordings=PREFIXES), both_sides(_summary))
MULTIHOP = Probe(_has_hops, _look_hops, both_sides(_summary))
