"""The overlay: what a stack makes of a module's output where its weight can't be folded.

    y' = y + (y R^T) L^T,   I + L R = (I + L_k R_k) ... (I + L_1 R_1)

Left multiplication acts on outputs, so no weight is needed, and on a tensor-parallel rank's
partial sum it acts as on the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .compose import compose
from .low_rank import LowRank


def overlay(y: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """``y`` ``[..., d_out]`` under the deltas of ``factors`` ``[d_out, 2 r]``: ``L`` and ``R^T``.

    Factors of zeros give ``y`` as it is. Same dtype and device for both.
    """
    rank = factors.shape[1] // 2
    return y + (y @ factors[:, rank:]) @ factors[:, :rank].T


@torch.no_grad()
def factors(deltas: Sequence[LowRank], d_out: int, rank: int) -> torch.Tensor:
    """What :func:`overlay` needs to do as ``deltas`` do, padded with zeros to ``rank``.

    Args:
        deltas: multiplicative, ``deltas[0]`` first; none: zeros.
        d_out: rows of their weight.
        rank: at least the sum of their ranks.

    Returns:
        ``[d_out, 2 rank]``, float64 on the CPU: ``L``, then ``R^T``.

    Raises:
        ValueError: additive deltas, ranks beyond ``rank``, shapes that don't fit.
    """
    out = torch.zeros(d_out, 2 * rank, dtype=torch.float64)
    if not deltas:
        return out
    one = compose(deltas)
    own = one.left.shape[1]
    if one.kind != "multiplicative" or one.left.shape[0] != d_out or own > rank:
        raise ValueError(
            f"a {one.kind} delta of {tuple(one.left.shape)} is no overlay of {d_out} rows"
            f" and rank {rank}"
        )
    out[:, :own] = one.left
    out[:, rank : rank + own] = one.right.T
    return out
