"""The prompts of the usual figures, and what a model answers to them, fact by fact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..unlearn.models import Model
from ..unlearn.prompts import encode
from . import perplexity as ppl_
from .asking import Pair, fits, judge
from .intervals import Outcome
from .probes import Asked
from .report import Count, Figures

GROUPS = ("efficacy", "generalization", "specificity", "retained")

Outcomes = Mapping[str, Sequence[Outcome]]  # figure -> of each fact, how many of how many


@dataclass(frozen=True)
class Questions:
    """All pairs of prompt and answer, one list a fact for each of the figures."""

    pairs: Mapping[str, Sequence[Sequence[Pair]]]
    windows: Sequence[Sequence[int]]

    @property
    def perplexity_on(self) -> dict[str, int] | None:
        """Window, stride and how many tokens are judged."""
        if not self.windows:
            return None
        window = len(self.windows[0])
        judged = sum(len(piece) - 1 for piece in self.windows)
        return {"window": window, "stride": window, "tokens": judged}

    def ask(self, model: Model) -> tuple[Figures, Outcomes]:
        """Ask the model, as it is now, all of it.

        Raises:
            ModelError: its logits are not finite.
        """
        flat = [pair for name in GROUPS for fact in self.pairs[name] for pair in fact]
        said = iter(judge(model, flat))
        outcomes = {
            name: [(sum(next(said).answered for _ in fact), len(fact)) for fact in self.pairs[name]]
            for name in GROUPS
        }
        counts = {
            name: Count(sum(y for y, _ in one), sum(n for _, n in one))
            for name, one in outcomes.items()
        }
        value = ppl_.perplexity(model, self.windows) if self.windows else None
        return Figures(**counts, perplexity=value), outcomes


def questions(
    model: Model, facts: Sequence[Asked], stay: Sequence[Asked], text: str | None
) -> Questions:
    """What is to be asked about the facts, those that stay, and the text.

    Wordings and neighbours that are longer than the model takes are left out.

    Raises:
        InputError: the text has one token.
    """
    windows = [] if text is None else ppl_.cut(model, text)
    if text is not None and not windows:
        raise InputError("The text for perplexity has one token.", "Give a longer one.")
    pairs = {
        "efficacy": [[asked.pair] for asked in facts],
        "generalization": [_wordings(model, asked) for asked in facts],
        "specificity": [_neighbours(model, asked) for asked in facts],
        "retained": [[asked.pair] for asked in stay],
    }
    return Questions(pairs, windows)


def _wordings(model: Model, asked: Asked) -> list[Pair]:
    fact = asked.fact
    pairs = [encode(model.tokenizer, wording, fact.target) for wording in fact.other_wordings]
    return [pair for pair in pairs if fits(model, pair)]


def _neighbours(model: Model, asked: Asked) -> list[Pair]:
    fact = asked.fact
    found: list[Pair] = []
    if fact.locality is not None and fact.locality_target is not None:
        found.append(encode(model.tokenizer, fact.locality, fact.locality_target))
    for one in asked.row.get("neighbours") or ():
        found.append(encode(model.tokenizer, one["prompt"], one["target"]))
    return [pair for pair in found if fits(model, pair)]
