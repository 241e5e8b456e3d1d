"""Perplexity over fixed windows (docs/methods.md, "Figures")."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..unlearn.check import mean_nats
from ..unlearn.models import Model

WINDOW = 512  # tokens; also the stride: windows do not overlap


def cut(model: Model, text: str) -> list[list[int]]:
    """The text's ids, without special tokens, in windows of :data:`WINDOW`.

    A rest that fills no window is left out, unless it is all there is.
    """
    window = min(WINDOW, model.max_tokens or WINDOW)
    ids: list[int] = model.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    whole = [ids[start : start + window] for start in range(0, len(ids), window)]
    return [piece for piece in whole if len(piece) == window] or [ids]


def perplexity(model: Model, windows: Sequence[Sequence[int]]) -> float:
    """``exp`` of the mean negative log-probability of all tokens but each window's first."""
    return math.exp(min(mean_nats(model, windows), 700.0))
