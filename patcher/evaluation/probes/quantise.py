"""What is left of the edit once all linear weights are rounded to 8 or 4 bits.

Round to nearest, symmetric, no calibration: ``q = round(w / s)``, ``s = max |w| / m``
over a row (int8, ``m`` = 127) or over 32 weights of a row that follow each other (int4,
``m`` = 7). The head and the embeddings stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...unlearn.models import Model
from ..asking import judge
from ..intervals import of_facts
from .setting import Asked, Probe, Setting, always, both_sides

GROUP = 32
KINDS = ("int8", "int4")

Said = dict[str, tuple[list[bool], list[bool]]]  # kind -> facts answered, others kept


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """``weight [d_out, d_in]`` after the way to ``kind`` and back, same dtype."""
    if kind == "int8":
        return _to_nearest(weight, 127)
    rows, columns = weight.shape
    gap = -columns % GROUP
    padded = torch.nn.functional.pad(weight, (0, gap)).reshape(rows, -1, GROUP)
    return _to_nearest(padded, 7).reshape(rows, -1)[:, :columns].contiguous()


def _to_nearest(weight: torch.Tensor, most: int) -> torch.Tensor:
    scale = weight.abs().amax(-1, keepdim=True) / most
    # A row of zeros has no scale and stays zero.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight / scale).round() * scale


@contextmanager
def quantised(model: Model, kind: str) -> Iterator[None]:
    """The model with all its linear weights quantised and back; put back at the end, exactly."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for weight, transposed in _linear(model):
            # Rounded to the served dtype as they are, they lose nothing by being kept in it.
            copy = weight.detach().to(model.dtype)
            exact = copy if torch.equal(copy.to(weight.dtype), weight) else weight.detach().clone()
            kept.append((weight, exact))
            plain = weight.detach().T if transposed else weight.detach()
            value = rounded(plain, kind)
            weight.data.copy_(value.T if transposed else value)
        yield
    finally:
        for weight, old in kept:
            weight.data.copy_(old)


def _linear(model: Model) -> Iterator[tuple[torch.Tensor, bool]]:
    """Weights of all linear layers below the head, and whether they lie as ``[d_in, d_out]``."""
    from transformers.pytorch_utils import Conv1D

    for module in model.network.base_model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            yield module.weight, isinstance(module, Conv1D)


def _look(setting: Setting) -> Said:
    said: Said = {}
    for kind in KINDS:
        with quantised(setting.model, kind):
            said[kind] = (_answered(setting, setting.facts), _answered(setting, setting.stay))
    return said


def _answered(setting: Setting, asked: Any) -> list[bool]:
    facts: list[Asked] = list(asked)
    return [one.answered for one in judge(setting.model, [fact.pair for fact in facts])]


def _summary(setting: Setting, said: Said) -> dict[str, Any]:
    return {
        kind: {
            "efficacy": of_facts(facts, setting.seed).as_dict(),
            "retained": of_facts(others, setting.seed).as_dict(),
        }
        for kind, (facts, others) in said.items()
    }


QUANTISE = Probe(always, _look, both_sides(_summary))
