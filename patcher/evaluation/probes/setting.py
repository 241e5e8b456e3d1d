"""What all probes are given: the model, the facts as ids, what else their rows say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...unlearn.facts import Fact
from ...unlearn.forward import Edit
from ...unlearn.models import Model
from ...unlearn.prompts import Encoded, encode, render
from ...unlearn.subject import guess
from ..asking import Pair, fits

Row = Mapping[str, Any]


class CanNotAskError(Exception):
    """A probe has nothing to ask here; says why."""


@dataclass(frozen=True)
class Asked:
    """One fact, its ids, and its row with what facts don't keep."""

    fact: Fact
    encoded: Encoded
    row: Row

    @property
    def pair(self) -> Pair:
        """Ids of prompt and answer."""
        return self.encoded.prompt, self.encoded.answer

    @property
    def subject(self) -> str | None:
        """The subject: the fact's own, or the guessed one; None where there is no word."""
        if self.fact.subject is not None:
            return self.fact.subject
        span = guess(self.fact.text)
        return None if span is None else self.fact.text[slice(*span)]

    @property
    def relation(self) -> str:
        """What is asked: the row's ``relation``, else the prompt without its subject."""
        named = self.row.get("relation")
        if isinstance(named, str) and named.strip():
            return named
        subject = self.subject
        return self.fact.text.replace(subject, "{}") if subject else self.fact.text


@dataclass(frozen=True)
class Setting:
    """An evaluation as probes see it.

    ``facts``: those to be forgotten. ``retain``: those of the file of others; ``stay``:
    those of them that the base knows. ``edited``: the layers that the patches change,
    empty without patches. ``edits``: the patches' deltas, the bottom of the stack first.
    """

    model: Model
    facts: Sequence[Asked]
    retain: Sequence[Asked]
    stay: Sequence[Asked]
    edited: tuple[int, ...]
    seed: int = 0
    edits: Sequence[Edit] = ()


class Probe(NamedTuple):
    """One further figure.

    ``ready``: raises :class:`CanNotAskError` where it can't be asked. ``look``: run on
    the weights as they are; what it gives is handed to ``tell``, from before and after,
    which makes the document. ``once``: ``look`` is run on the base's weights alone, and
    ``tell`` gets None for those after.
    """

    ready: Callable[[Setting], None]
    look: Callable[[Setting], Any]
    tell: Callable[[Setting, Any, Any], dict[str, Any]]
    once: bool = False


def always(setting: Setting) -> None:
    """Of probes that can be asked of any model and facts."""


def both_sides(
    summary: Callable[[Setting, Any], dict[str, Any]],
) -> Callable[[Setting, Any, Any], dict[str, Any]]:
    """A ``tell`` that summarises either side alone."""

    def tell(setting: Setting, base: Any, patched: Any) -> dict[str, Any]:
        return {"base": summary(setting, base), "patched": summary(setting, patched)}

    return tell


def reworded(asked: Asked, model: Model, wording: str) -> Pair | None:
    """The fact with its prompt put into ``wording``, whose ``{}`` it takes.

    In a chat, what the user said last is reworded. None where it would be longer than
    the model takes.
    """
    fact = asked.fact
    text = wording.replace("{}", fact.text)
    if fact.messages is None:
        pair = encode(model.tokenizer, text, fact.target)
    else:
        messages = [dict(message) for message in fact.messages]
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        messages[last]["content"] = text
        pair = encode(model.tokenizer, render(model.tokenizer, messages), fact.target, chat=True)
    return pair if fits(model, pair) else None
