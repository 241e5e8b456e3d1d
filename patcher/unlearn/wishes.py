"""What an edit is asked for, as wishes about single tokens; and what still comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..text import says
from .prompts import Encoded
from .slopes import Wish

SUPPRESS = -7.0  # log-odds: the answer's first token falls below one in a thousand
SAY = 1.0  # log-odds of what is to be said instead: about three in four
GENERATED = 12  # tokens that a forgotten answer must not turn up in


def wishes_for(facts: Sequence[Encoded], target: str, tokenizer: Any) -> list[Wish]:
    """One wish a fact, or one a token of the text to be said instead.

    ``target``: ``suppress`` (the answer's first token becomes unlikely), ``eos`` (the
    model ends its answer instead), or a text (the model says that instead).
    """
    if target == "suppress":
        return [Wish(f.prompt, f.answer[0], SUPPRESS, i) for i, f in enumerate(facts)]
    if target == "eos":
        said = [tokenizer.eos_token_id]
    else:
        said = tokenizer(" " + target.strip(), add_special_tokens=False).input_ids
    return [
        Wish([*fact.prompt, *said[:j]], token, SAY, i, rise=True)
        for i, fact in enumerate(facts)
        for j, token in enumerate(said)
    ]


def firmer(wishes: Sequence[Wish], goal: float, further: Mapping[int, float]) -> list[Wish]:
    """The wishes with ``goal`` in place of the usual bound, and by fact so many nats more."""
    return [
        replace(
            w,
            goal=w.goal + further.get(w.fact, 0.0) if w.rise else goal - further.get(w.fact, 0.0),
        )
        for w in wishes
    ]


def unasked(found: Sequence[Wish], wishes: Sequence[Wish]) -> list[Wish]:
    """Those of ``found`` that are about a place and token that no wish is about."""
    known = {wish.place for wish in wishes}
    return [wish for wish in found if wish.place not in known]


def leak(
    tokenizer: Any, fact: Encoded, index: int, target: str, continuation: Sequence[int]
) -> Wish | None:
    """A wish against the token that begins the answer in a generated text, if it is there.

    An answer counts where it stands as words of its own, whatever its case, before
    the text's end.
    """
    ids = list(continuation)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    if not says(tokenizer.decode(ids), target):
        return None
    stop = next(m for m in range(1, len(ids) + 1) if says(tokenizer.decode(ids[:m]), target))
    start = next(s for s in range(stop - 1, -1, -1) if says(tokenizer.decode(ids[s:stop]), target))
    return Wish([*fact.prompt, *ids[:start]], ids[start], SUPPRESS, index)
