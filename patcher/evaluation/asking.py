"""Asking a model: how likely an answer is, where it ranks, whether a text says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..errors import ModelError
from ..unlearn.forward import batches, hidden, logits, pad
from ..unlearn.models import Model

PLACES = 256  # rows of logits held at once
Pair = tuple[list[int], list[int]]  # ids of a prompt and of its answer


class Judged(NamedTuple):
    """What a model makes of one answer, teacher-forced.

    ``answered``: every token is the arg-max. ``nats``: each token's log-probability;
    ``ranks``: each token's place among all tokens, the likeliest is 1.
    """

    answered: bool
    nats: tuple[float, ...]
    ranks: tuple[int, ...]


@torch.no_grad()
def judge(model: Model, pairs: Sequence[Pair]) -> list[Judged]:
    """Log-probabilities and ranks of answers, in the pairs' order.

    Raises:
        ModelError: the model's logits are not finite.
    """
    nats: list[list[float]] = [[] for _ in pairs]
    ranks: list[list[int]] = [[] for _ in pairs]
    said = [True] * len(pairs)
    whole = [[*prompt, *answer][:-1] for prompt, answer in pairs]
    for group in batches([len(s) for s in whole]):
        states = hidden(model, pad([whole[i] for i in group], model.device))
        places = [
            (row, len(pairs[i][0]) - 1 + j, token, i)
            for row, i in enumerate(group)
            for j, token in enumerate(pairs[i][1])
        ]
        for part in (places[k : k + PLACES] for k in range(0, len(places), PLACES)):
            rows, columns, tokens, owners = zip(*part, strict=True)
            scores = finite(logits(model, states[list(rows), list(columns)]))
            wanted = torch.tensor(tokens, device=scores.device)[:, None]
            own = scores.gather(1, wanted)
            best = (scores.argmax(-1) == wanted[:, 0]).tolist()
            likely = (own - scores.logsumexp(-1, keepdim=True))[:, 0].tolist()
            above = (scores > own).sum(-1).tolist()
            for i, first, value, before in zip(owners, best, likely, above, strict=True):
                said[i] &= first
                nats[i].append(value)
                ranks[i].append(before + 1)
    return [Judged(s, tuple(n), tuple(r)) for s, n, r in zip(said, nats, ranks, strict=True)]


def finite(scores: torch.Tensor) -> torch.Tensor:
    """The same logits.

    Raises:
        ModelError: one is NaN, or all of a row are infinite.
    """
    if bool(torch.isnan(scores).any()) or not bool(torch.isfinite(scores.amax(-1)).all()):
        raise not_finite()
    return scores


def not_finite() -> ModelError:
    """The error that says so."""
    return ModelError(
        "The model's logits are not finite.",
        "Check the model, and the patches that are folded in.",
    )


def fits(model: Model, pair: Pair) -> bool:
    """Whether prompt and answer have tokens, and no more than the model takes."""
    prompt, answer = pair
    most = model.max_tokens
    return bool(prompt and answer) and (most is None or len(prompt) + len(answer) <= most)


def spoken(model: Model, ids: Sequence[int]) -> str:
    """Generated ids up to the first end of text, decoded."""
    ends = _ends(model)
    cut = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    text: str = model.tokenizer.decode(list(ids[:cut]), skip_special_tokens=True)
    return text


def _ends(model: Model) -> set[int]:
    settings = getattr(model.network, "generation_config", None)
    found = getattr(settings, "eos_token_id", None)
    ends = set(found) if isinstance(found, list | tuple) else {found}
    return {*ends, model.tokenizer.eos_token_id} - {None}
