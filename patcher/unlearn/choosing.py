"""Which facts an edit is made of, and what speaks against them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ForgetSetError, ModelError, UsageError
from ..patch.canonical import MAX_INTEGER
from .facts import Fact, unusable
from .forward import answered
from .models import Model
from .progress import Progress
from .prompts import Encoded, encode_facts

logger = logging.getLogger("patcher")


@dataclass(frozen=True)
class Chosen:
    """The facts that an edit is made of, and how many were looked at for them."""

    facts: list[Fact]
    encoded: list[Encoded]
    known: list[bool]
    looked_at: int
    known_of_them: int


def check_limit(limit: int | None) -> None:
    """See that a limit is a number of facts.

    Raises:
        UsageError: it isn't.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"The limit is {limit}.", "Give a number of facts from 1 on.")


def check_seed(seed: int, least: int = -MAX_INTEGER) -> None:
    """See that a seed is one that every generator takes and a manifest can hold.

    Raises:
        UsageError: it isn't.
    """
    if not least <= seed <= MAX_INTEGER:
        raise UsageError(
            f"The seed is {seed}.", f"Give a whole number from {least} to {MAX_INTEGER}."
        )


def check_target(target: str, facts: Sequence[Fact]) -> None:
    """See that what is to be said instead is something, and none of what is to be forgotten.

    Raises:
        UsageError: it is empty, or the answer of a fact.
    """
    if not target.strip():
        raise UsageError("The target is empty.", "Give suppress, eos or a text.")
    same = [fact.line for fact in facts if _plain(fact.target) == _plain(target)]
    if same and target not in ("suppress", "eos"):
        raise UsageError(
            f"The target is what line {same[0]} is to forget.", "Give another text, or suppress."
        )


def check_target_tokens(tokenizer: Any, target: str) -> None:
    """See that the model can say what it is to say instead.

    Raises:
        UsageError: the text has no tokens for this model.
        ModelError: ``eos``, and the model has no end of text.
    """
    if target == "eos" and tokenizer.eos_token_id is None:
        raise ModelError("The model's tokenizer has no end of text.", "Give --target suppress.")
    if target not in ("suppress", "eos"):
        ids = tokenizer(" " + target.strip(), add_special_tokens=False).input_ids
        if not ids:
            raise UsageError("The target has no tokens for this model.", "Give another text.")


def check_agreement(forget: Sequence[Fact], retain: Sequence[Fact]) -> None:
    """See that nothing is to be forgotten and to stay at once.

    Two answers to one prompt may both be to be forgotten; that is said as a warning.

    Raises:
        ForgetSetError: a fact stands in both sets, or is another line's neighbour with the
            answer that must stay: all such lines are named.
    """
    own = {(_asked(fact), _plain(fact.target)): fact.line for fact in forget}
    problems = [
        f"line {own[key]}: to be forgotten, and to stay by line {fact.line} of the retained facts"
        for fact in retain
        if (key := (_asked(fact), _plain(fact.target))) in own
    ]
    problems += [
        f"line {own[key]}: to be forgotten, and to stay as the locality of line {fact.line}"
        for fact in forget
        if fact.locality is not None
        and (key := (_plain(fact.locality), _plain(fact.locality_target or ""))) in own
    ]
    if problems:
        raise unusable(problems)
    answers: dict[str, int] = {}
    for fact in forget:
        answers[_asked(fact)] = answers.get(_asked(fact), 0) + 1
    several = sum(count > 1 for count in answers.values())
    if several:
        logger.warning(
            "%d %s more than one answer to be forgotten: a model gives one of them at most",
            several, "prompt has" if several == 1 else "prompts have",
        )  # fmt: skip


def tell_unknown(chosen: Chosen, known_only: bool) -> None:
    """Say how many facts the model doesn't know, where they are computed with all the same."""
    unknown = len(chosen.known) - sum(chosen.known)
    if unknown and not known_only:
        logger.warning(
            "the model doesn't know %d of the %d facts; --known-only leaves such out",
            unknown, len(chosen.known),
        )  # fmt: skip


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _asked(fact: Fact) -> str:
    if fact.messages is not None:
        return "\n".join(f"{m['role']}: {_plain(m['content'])}" for m in fact.messages)
    return _plain(fact.text)


def choose(
    model: Model, facts: Sequence[Fact], known_only: bool, limit: int | None, progress: Progress
) -> Chosen:
    """Encode facts and find out which the model knows; with ``known_only`` take only those.

    Raises:
        ForgetSetError: a fact can't be encoded; or none is known, with ``known_only``.
    """
    check_limit(limit)
    wanted = len(facts) if limit is None else limit
    if not known_only:
        facts = facts[:wanted]
    picked: list[int] = []
    encoded: list[Encoded] = []
    known: list[bool] = []
    progress.start("What the model knows", len(facts))
    while len(known) < len(facts) and len(picked) < wanted:
        part = facts[len(known) : len(known) + 256]
        ids = encode_facts(model.tokenizer, part, model.max_tokens)
        said = answered(model, [(e.prompt, e.answer) for e in ids])
        picked += [len(known) + i for i, yes in enumerate(said) if yes or not known_only]
        encoded += ids
        known += said
        progress.step(len(known))
    progress.finish()
    picked = picked[:wanted]
    if not picked:
        raise ForgetSetError(
            f"The model knows none of the {len(facts)} facts.",
            "Leave --known-only out to compute the patch nevertheless.",
        )
    stop = picked[-1] + 1 if len(picked) == wanted else len(known)
    return Chosen(
        [facts[i] for i in picked],
        [encoded[i] for i in picked],
        [known[i] for i in picked],
        stop,
        sum(known[:stop]),
    )
