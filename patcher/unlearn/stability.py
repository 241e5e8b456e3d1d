"""Whether what is preserved determines an edit: condition numbers, and more ridge if need be."""

from __future__ import annotations

import logging

import torch

from ..errors import NumericalError
from .models import Model

LIMIT = 1e12  # of the condition number: past it float64 has no digits left to solve with
SEEN = 1e-7  # of the largest eigenvalue: below it there is only float32's rounding
HOPELESS = 0.5  # of the directions, at least, have to be seen
logger = logging.getLogger("patcher")


def finite(found: torch.Tensor, what: str, cure: str) -> torch.Tensor:
    """``found``, once all of it is seen to be finite.

    Raises:
        NumericalError: it isn't; ``what`` is named.
    """
    if not torch.isfinite(found).all():
        raise NumericalError(f"{what} has values that are not finite.", cure)
    return found


def finite_weights(model: Model) -> None:
    """See that all of the model's weights are finite.

    Raises:
        NumericalError: a parameter isn't; it is named.
    """
    for name, weight in model.network.named_parameters():
        finite(weight, f"The model's {name}", "Give a sound checkpoint.")


def steadied(
    model: Model, layer: int, moment: torch.Tensor, limit: float = LIMIT
) -> tuple[torch.Tensor, float]:
    """A second moment that can be solved with, and the condition number of ``A = W C Wᵀ``.

    Where that is past ``limit``, a ridge is added to ``C``, tenfold more until it isn't,
    with a warning.

    Args:
        model: whose down projection ``W [d_out, d_in]`` is meant.
        layer: zero-based.
        moment: ``C [d_in, d_in]`` float32.
        limit: of the condition number.

    Raises:
        NumericalError: ``C`` or ``W`` is not finite, or shows less than half of the directions.
    """
    where = f"layer {layer}"
    finite(moment, f"The statistics of {where}", "Give another --reference, or --dtype.")
    W = model.weight(model.module_name(layer)).double()
    C = moment.to(W)
    values = torch.linalg.eigvalsh(W @ C @ W.T)
    seen = int((values > SEEN * values[-1]).sum()) if values[-1] > 0 else 0
    if seen < HOPELESS * len(values):
        raise NumericalError(
            f"What is to be preserved shows {seen} of the {len(values)} directions of {where}: "
            "too few for a stable solve.",
            "Give a longer --reference, some thousand words of many kinds.",
        )
    ridge, found = 0.0, _condition(values)
    mean = float(C.diagonal().mean())
    eye = torch.eye(len(C)).to(C)
    while found > limit and ridge < 1e-2:
        ridge = max(10 * ridge, 1e-10)
        found = _condition(torch.linalg.eigvalsh(W @ (C + ridge * mean * eye) @ W.T))
    if ridge:
        logger.warning(
            "layer %d: what is preserved hardly determines the edit; "
            "a ridge of %.0e of its mean brings the condition number to %.1e",
            layer, ridge, found,
        )  # fmt: skip
        moment = (C + ridge * mean * eye).to(moment)
    return moment, float(f"{found:.3g}")


def _condition(values: torch.Tensor) -> float:
    """Largest over smallest eigenvalue, ascending; negative ones are rounding."""
    return float(values[-1] / values[0].clamp(min=1e-300 + 1e-18 * float(values[-1])))
