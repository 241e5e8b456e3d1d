"""Bars that a patch is to keep within, and what it reaches (docs/methods.md, "Verified edits")."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from ..errors import BarsNotMetError, UsageError

#: What each bar's figure is taken on, for messages and documents.
MEASURED_ON = {
    "max_efficacy": "facts to be forgotten that the model knows",
    "max_leaked": "facts that the model knows, in generated text",
    "max_generalization": "other wordings that the model answers",
    "min_specificity": "neighbours and prompts about other subjects",
    "max_ppl_ratio": "reference text that the statistics did not see",
    "min_retained": "facts to be retained that the model knows",
}
_NEEDED = {
    "max_efficacy": "The model knows none of the facts.",
    "max_leaked": "The model knows none of the facts.",
    "max_generalization": "Give rephrase or paraphrases that the model answers.",
    "min_specificity": "Give neighbours that the model answers.",
    "max_ppl_ratio": "Give a longer --reference, some thousand words.",
    "min_retained": "Give --retain with facts that the model knows.",
}
_CURES = {
    "max_efficacy": "Name more layers, or allow more damage.",
    "max_leaked": "Name more layers, or allow more damage.",
    "max_generalization": "Try --augment, or name more layers.",
    "min_specificity": "Forget fewer facts at once, or allow more of them to be answered.",
    "max_ppl_ratio": "Forget fewer facts at once, or give a --reference like what is served.",
    "min_retained": "Forget fewer facts at once, or retain fewer that are like them.",
}


class Reached(NamedTuple):
    """``value``: of the figure on the patched weights, None where there was nothing to ask."""

    bar: float
    value: float | None

    def missed(self, name: str) -> float:
        """By how much the bar is missed; 0 where it holds."""
        if self.value is None or math.isnan(self.value):
            return math.inf
        gap = self.bar - self.value if name.startswith("min_") else self.value - self.bar
        return max(0.0, gap)


@dataclass(frozen=True)
class Bars:
    """Bounds on a patch's figures; None: no bound. Shares are from 0 to 1.

    Raises:
        UsageError: a share is outside of 0 to 1, or the ratio is not a positive number.
    """

    max_efficacy: float | None = None
    max_leaked: float | None = None
    max_generalization: float | None = None
    min_specificity: float | None = None
    max_ppl_ratio: float | None = None
    min_retained: float | None = None

    def __post_init__(self) -> None:
        for name, bar in self.given.items():
            word = "--" + name.replace("_", "-")
            if not isinstance(bar, int | float) or isinstance(bar, bool) or not math.isfinite(bar):
                raise UsageError(f"{word} is no number.", "Give one like 0.95.")
            if name == "max_ppl_ratio" and bar <= 0:
                raise UsageError(f"{word} is {bar}.", "Give a ratio above 0, such as 1.01.")
            if name != "max_ppl_ratio" and not 0 <= bar <= 1:
                raise UsageError(f"{word} is {bar}.", "Give a share from 0 to 1.")

    @property
    def given(self) -> dict[str, float]:
        """The bars that were given, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def reached(self, figures: Mapping[str, float | None]) -> dict[str, Reached]:
        """Each bar beside its figure."""
        return {name: Reached(bar, figures[name]) for name, bar in self.given.items()}

    def measurable(self, figures: Mapping[str, float | None]) -> None:
        """See that there is something to measure each bar on.

        Args:
            figures: those of the unpatched model.

        Raises:
            UsageError: there is not; before anything was computed.
        """
        for name in self.given:
            if figures[name] is None:
                word = "--" + name.replace("_", "-")
                raise UsageError(
                    f"{word} has nothing to be measured on: {MEASURED_ON[name]}.", _NEEDED[name]
                )


def missed(reached: Mapping[str, Reached]) -> list[str]:
    """The names of the bars that don't hold."""
    return [name for name, one in reached.items() if one.missed(name) > 0]


def rank(reached: Mapping[str, Reached]) -> tuple[int, float]:
    """The less the better: how many bars are missed, and by how much in all."""
    gaps = [one.missed(name) for name, one in reached.items()]
    return sum(gap > 0 for gap in gaps), sum(gaps)


def as_document(reached: Mapping[str, Reached]) -> dict[str, dict[str, Any]]:
    """As manifests and ``--json`` have it: ``{name: {bar, value, met}}``."""
    return {
        name: {
            "bar": one.bar,
            "value": None if one.value is None else round(one.value, 5),
            "met": one.missed(name) == 0,
        }
        for name, one in reached.items()
    }


def not_met(reached: Mapping[str, Reached], attempts: int) -> BarsNotMetError:
    """The error that names the bars that don't hold, with their figures and what may help."""
    names = missed(reached)
    count = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    return BarsNotMetError(
        f"After {count} the patch misses {_said(names, reached)}.",
        " ".join(dict.fromkeys(_CURES[name] for name in names)),
    )


def _said(names: Sequence[str], reached: Mapping[str, Reached]) -> str:
    return "; ".join(
        f"{name} {reached[name].bar:g} with {_shown(reached[name].value)} of {MEASURED_ON[name]}"
        if name != "max_ppl_ratio"
        else f"{name} {reached[name].bar:g} with {_shown(reached[name].value)} "
        f"on {MEASURED_ON[name]}"
        for name in names
    )


def _shown(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4g}"
