"""Perplexity over fixed windows (docs/methods.md, "Figures")."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..unlearn.check import mean_nats
from ..unlearn.models import Model
from ..unlearn.reference import windows
from .asking import not_finite

WINDOW = 512  # tokens; also the stride: windows do not overlap


def cut(model: Model, text: str) -> list[list[int]]:
    """The text's ids in windows of :data:`WINDOW`, special tokens at the head included.

    A rest that fills no window is left out, unless it is all there is.
    """
    window = min(WINDOW, model.max_tokens or WINDOW)
    whole = windows(model.tokenizer, text, window, len(text))
    return [piece for piece in whole if len(piece) == window] or whole


def perplexity(model: Model, pieces: Sequence[Sequence[int]]) -> float:
    """``exp`` of the mean negative log-probability of all tokens but each window's first.

    Raises:
        ModelError: the model's logits are not finite.
    """
    nats = mean_nats(model, pieces)
    if math.isnan(nats):
        raise not_finite()
    return math.exp(min(nats, 700.0))
