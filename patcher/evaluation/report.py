"""What an evaluation says: figures before and after, and of how many prompts each is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .definitions import definitions_of


@dataclass(frozen=True)
class Count:
    """``yes`` of ``of`` prompts are answered with their target."""

    yes: int
    of: int

    @property
    def fraction(self) -> float | None:
        """The share; None where there was nothing to ask."""
        return self.yes / self.of if self.of else None


@dataclass(frozen=True)
class Figures:
    """The figures of one set of weights (docs/methods.md, "Figures").

    ``efficacy``: the facts' prompts. ``generalization``: their other wordings.
    ``specificity``: their neighbours. ``retained``: the facts that are to stay.
    ``perplexity``: of the text; None where none was given.
    """

    efficacy: Count
    generalization: Count
    specificity: Count
    retained: Count
    perplexity: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Fractions and the perplexity; null where there was nothing to ask."""
        return {
            "efficacy": self.efficacy.fraction,
            "generalization": self.generalization.fraction,
            "specificity": self.specificity.fraction,
            "retained": self.retained.fraction,
            "perplexity": self.perplexity,
        }

    def counts(self) -> dict[str, dict[str, int]]:
        """Of each fraction, how many of how many."""
        return {
            name: asdict(getattr(self, name))
            for name in ("efficacy", "generalization", "specificity", "retained")
        }


@dataclass(frozen=True)
class EvaluationReport:
    """An evaluation.

    ``facts``: how many were looked at; ``known``: how many of them the base answers.
    ``base`` and ``patched``: figures without and with the patches. ``retain``: facts in
    the file of those that are to stay, and how many of them the base knows.
    ``perplexity_on``: window, stride and tokens of the perplexity. ``patches``: ids, the
    bottom of the stack first. ``intervals``: 95 % intervals, as ``counts`` is laid out.
    ``groups``: efficacy and retained by the facts' relation or part of the dataset.
    ``probes``: further figures by name; ``skipped``: why some could not be asked.
    ``changed``: how far each module moved. ``lm_eval``: the tasks' numbers.
    ``each``: of each fact, how many of how many prompts, a figure. ``texts``, ``targets``,
    ``replies``: prompts, answers and what the model says, in documents only on demand.
    """

    facts: int
    known: int
    base: Figures
    patched: Figures
    retain: Count
    perplexity_on: dict[str, int] | None
    patches: tuple[str, ...]
    dtype: str
    intervals: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Any] = field(default_factory=dict)
    probes: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    lm_eval: Mapping[str, Any] | None = None
    format: str = "jsonl"
    each: Mapping[str, Mapping[str, Sequence[tuple[int, int]]]] = field(default_factory=dict)
    texts: tuple[str, ...] = field(default=(), repr=False)
    targets: tuple[str, ...] = field(default=(), repr=False)
    replies: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)

    def as_dict(self, *, with_texts: bool = False) -> dict[str, Any]:
        """The document of ``patcher evaluate --json``; ``with_texts`` adds the facts' texts."""
        more = {"texts": self._texts()} if with_texts else {}
        return more | {
            "facts": self.facts,
            "known": self.known,
            "base": self.base.as_dict(),
            "patched": self.patched.as_dict(),
            "counts": {"base": self.base.counts(), "patched": self.patched.counts()},
            "retain": {"facts": self.retain.of, "known": self.retain.yes},
            "perplexity_on": self.perplexity_on,
            "patches": list(self.patches),
            "dtype": self.dtype,
            "format": self.format,
            "intervals": dict(self.intervals),
            "groups": dict(self.groups),
            "probes": dict(self.probes),
            "skipped": dict(self.skipped),
            "changed": dict(self.changed),
            "lm_eval": self.lm_eval,
            "each": {
                side: {name: [list(one) for one in outcomes] for name, outcomes in figures.items()}
                for side, figures in self.each.items()
            },
            "definitions": definitions_of(self.probes),
        }

    def _texts(self) -> list[dict[str, Any]]:
        return [
            {"prompt": text, "target": target}
            | {f"{side} says": said[i] for side, said in self.replies.items()}
            for i, (text, target) in enumerate(zip(self.texts, self.targets, strict=True))
        ]
