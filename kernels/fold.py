"""The fold: what a stack of low-rank deltas makes of a weight.

    W_eff = round((I + L_k R_k) ... (I + L_1 R_1) W)

with an additive delta, ``W + A B``, in its place in the order. Always from the
pristine base, in float64; the result goes through float32 to the base's dtype, as every
library's conversion does, so that a merge by other code gives the same bits (docs/adr/0002).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

Kind = Literal["multiplicative", "additive"]
BASE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class LowRank(NamedTuple):
    """One delta on a weight ``W [d_out, d_in]``.

    ``multiplicative``: ``W' = (I + left right) W``, left ``[d_out, r]``, right ``[r, d_out]``.
    ``additive``: ``W' = W + left right``, left ``[d_out, r]``, right ``[r, d_in]``.
    """

    kind: Kind
    left: torch.Tensor
    right: torch.Tensor

    def columns(self, start: int, stop: int) -> LowRank:
        """The part of this delta that acts on ``W[:, start:stop]``; a view."""
        if self.kind == "multiplicative":
            return self  # a left factor acts on every column alike
        return self._replace(right=self.right[:, start:stop])


@torch.no_grad()
def fold(
    base: torch.Tensor,
    deltas: Sequence[LowRank],
    *,
    out: torch.Tensor | None = None,
    tile: int = 256,
) -> torch.Tensor:
    """The weights that ``deltas`` make of ``base``, in its dtype.

    Works on ``tile`` columns at a time, so its temporaries are float64 copies of
    the deltas and of one tile, never of the weight. A column of the result
    depends on that column of the base alone: folding a shard of the columns
    gives the shard of the fold. No deltas: a copy of the base, bit for bit. Values may
    come out infinite where the deltas make them so; that is for the caller to check.

    Args:
        base: ``[d_out, d_in]``, bfloat16, float16 or float32, any strides, any device.
        deltas: ``deltas[0]`` acts first; any floating dtype, on any device.
        out: where the result goes, shaped and typed like ``base``. May be ``base``
            itself (each tile is read before it is written); no other overlap.
        tile: columns at a time.

    Returns:
        ``out``, or a new contiguous tensor on the device of ``base``.

    Raises:
        ValueError: shapes or dtypes that don't fit, an ``out`` that overlaps ``base``.
    """
    _check(base, deltas, tile)
    if out is None:
        out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    else:
        _check_out(base, out)
    if not deltas:
        return out.copy_(base)
    wide = [_widen(delta, base.device) for delta in deltas]
    for start in range(0, base.shape[1], tile):
        stop = min(start + tile, base.shape[1])
        x = base[:, start:stop].to(torch.float64, memory_format=torch.contiguous_format)
        for delta in wide:
            part = delta.columns(start, stop)
            inner = part.right @ x if part.kind == "multiplicative" else part.right
            x.addmm_(part.left, inner)
        x.add_(0.0)  # -0.0 becomes +0.0: the sign of an exact zero hangs on the order of summing
        out[:, start:stop] = x.to(torch.float32).to(base.dtype)
    return out


def _widen(delta: LowRank, device: torch.device) -> LowRank:
    return delta._replace(
        left=delta.left.detach().to(device, torch.float64),
        right=delta.right.detach().to(device, torch.float64),
    )


def _check(base: torch.Tensor, deltas: Sequence[LowRank], tile: int) -> None:
    if base.ndim != 2 or 0 in base.shape:
        raise ValueError(f"a base is a matrix that is not empty, not shape {tuple(base.shape)}")
    if base.dtype not in BASE_DTYPES:
        raise ValueError(f"a base is bfloat16, float16 or float32, not {base.dtype}")
    if tile < 1:
        raise ValueError(f"a tile has at least one column, not {tile}")
    for number, delta in enumerate(deltas):
        check_delta(delta, base.shape[0], base.shape[1], f"delta {number}")


def check_delta(delta: LowRank, d_out: int, d_in: int, name: str = "delta") -> None:
    """Raise ValueError where ``delta`` does not fit a weight ``[d_out, d_in]``."""
    if delta.kind not in ("multiplicative", "additive"):
        raise ValueError(f"{name} is of unknown kind {delta.kind!r}")
    if delta.left.ndim != 2 or delta.right.ndim != 2:
        raise ValueError(f"{name} needs two matrices")
    if not (delta.left.is_floating_point() and delta.right.is_floating_point()):
        raise ValueError(f"{name} needs floating dtypes")
    width = d_out if delta.kind == "multiplicative" else d_in
    rank = delta.left.shape[1]
    if tuple(delta.left.shape) != (d_out, rank) or tuple(delta.right.shape) != (rank, width):
        raise ValueError(
            f"{name} ({delta.kind}) is {tuple(delta.left.shape)} by {tuple(delta.right.shape)},"
            f" which does not fit a weight of ({d_out}, {d_in})"
        )


def _check_out(base: torch.Tensor, out: torch.Tensor) -> None:
    if out.shape != base.shape or out.dtype != base.dtype or out.device != base.device:
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device},"
            f" base is {tuple(base.shape)} {base.dtype} on {base.device}"
        )
    same = out.data_ptr() == base.data_ptr() and out.stride() == base.stride()
    if not same and _overlap(base, out):
        raise ValueError("out overlaps base without being base")


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the address ranges meet: a superset of sharing memory, so safe."""
    return a.data_ptr() < _end(b) and b.data_ptr() < _end(a)


def _end(t: torch.Tensor) -> int:
    span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr() + (span + 1) * t.element_size()
