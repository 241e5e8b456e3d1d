"""The fold: what a stack of low-rank deltas makes of a weight.

    W_eff = round((I + L_k R_k) ... (I + L_1 R_1) W)

with an additive delta, ``W + A B``, in its place in the order. Always from the
pristine base, in float64; the result goes through float32 to the base's dtype, as every
library's conversion does, so that a merge by other code gives the same bits (docs/adr/0002).
The stack is composed first, so that its depth costs what its summed rank does, and then
laid over the weight tile by tile (docs/adr/0021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from .compose import Affine
from .low_rank import LowRank, check_delta

BASE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ROWS = 128  # of the weight at a time: long enough for the products, short enough for the cache
_FEW_ROWS = 768  # or all of them, read once
_MOVED_COLUMNS = 1024  # of a weight on the host, on the device at a time
_LEAST_COLUMNS, _MOST_COLUMNS = 64, 4096
_LEAST_BYTES = 4 << 20  # below, calls take longer than what they compute
_SHARE = 8  # of the weight's bytes, one part may be held beside it


@torch.no_grad()
def fold(
    base: torch.Tensor,
    deltas: Sequence[LowRank],
    *,
    out: torch.Tensor | None = None,
    tile: int | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The weights that ``deltas`` make of ``base``, in its dtype.

    Works on a tile of columns at a time, so that beside the result no more is held than an eighth
    of the weight's bytes or 4 MiB, whichever is more; several deltas are composed first, which
    takes ``16 d_out r`` bytes for a summed rank of ``r``, ``8 d_out²`` at most. A column of the
    result depends on that column of the base alone: folding a shard of the columns
    gives the shard of the fold. No deltas: a copy of the base, bit for bit. Values may
    come out infinite where the deltas make them so; that is for the caller to check.

    Args:
        base: ``[d_out, d_in]``, bfloat16, float16 or float32, any strides, any device.
        deltas: ``deltas[0]`` acts first; any floating dtype, on any device.
        out: where the result goes, shaped and typed like ``base``. May be ``base``
            itself (each tile is read before it is written); no other overlap.
        tile: columns at a time; by default what that memory allows.
        device: where to compute; by default where ``base`` is. Tiles go there and come back.

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
    device = device or base.device
    what = Affine([_moved(delta, device) for delta in deltas], *base.shape)
    lay = _dense if what.is_dense else _low_rank
    if device.type == base.device.type:
        lay(base, what, out, tile)
        return out
    for columns in _slices(base.shape[1], _MOVED_COLUMNS):
        there = base[:, columns].to(device)
        lay(there, what.columns(columns), there, tile)
        out[:, columns].copy_(there)
    return out


def _low_rank(base: torch.Tensor, what: Affine, out: torch.Tensor, tile: int | None) -> None:
    """``W + [L A] [R W; B]``: a tile's ``R W`` first, then the tile, some rows at a time."""
    d_out, d_in = base.shape
    r, rank, rows = what.factors.rank, what.factors.rank + what.added.rank, _rows(d_out)
    left, right = what.left(), what.factors.right
    budget = _budget(base)
    at_once = (r + rank) * d_out <= budget // 4
    if at_once:
        left, right = left.double(), right.double()
    held = (r + rank) * d_out if at_once else rows * rank
    width = tile or _width((budget - held) // (rank + rows), d_in)
    inner, x, scratch = _scratch(base, rank * width, rows * width, 0 if at_once else held)
    for columns in _slices(d_in, width):
        at = columns.stop - columns.start
        hidden = inner[: rank * at].view(rank, at)
        hidden[r:].copy_(what.added.right[:, columns])
        for part in _slices(d_out, rows) if r else ():
            block = _read(base[part, columns], x)
            factor = right[:, part] if at_once else _read(right[:, part], scratch)
            hidden[:r].addmm_(factor, block, beta=0 if part.start == 0 else 1)
        for part in _slices(d_out, rows):
            if not r or rows < d_out:
                block = _read(base[part, columns], x)
            factor = left[part] if at_once else _read(left[part], scratch)
            _write(block.addmm_(factor, hidden), out[part, columns])


def _dense(base: torch.Tensor, what: Affine, out: torch.Tensor, tile: int | None) -> None:
    """``D W + A B``: a tile of whole columns, then the tile's rows, some at a time."""
    d_out, d_in = base.shape
    left, right = (part.double() for part in what.added[1:])
    rows = _rows(d_out)
    width = tile or _width(_budget(base) // (d_out + rows), d_in)
    whole, x = _scratch(base, d_out * width, rows * width)
    for columns in _slices(d_in, width):
        read = _read(base[:, columns], whole)
        for part in _slices(d_out, rows):
            shape = (part.stop - part.start, read.shape[1])
            block = torch.mm(what.dense[part], read, out=x[: math.prod(shape)].view(shape))
            _write(block.addmm_(left[part], right[:, columns]), out[part, columns])


def _read(values: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    return scratch[: values.numel()].view(values.shape).copy_(values)


def _write(values: torch.Tensor, out: torch.Tensor) -> None:
    values.add_(0.0)  # -0.0 becomes +0.0: the sign of an exact zero hangs on the order of summing
    out.copy_(values)  # rounds to float32 first, then to the served dtype


def _moved(delta: LowRank, device: torch.device) -> LowRank:
    left, right = (part.detach().to(device) for part in delta[1:])
    return LowRank(delta.kind, left, right)


def _budget(base: torch.Tensor) -> int:
    """How many float64 values may be held beside the weight."""
    return max(base.nbytes // _SHARE, _LEAST_BYTES) // 8


def _rows(d_out: int) -> int:
    return d_out if d_out <= _FEW_ROWS else _ROWS


def _width(fits: int, d_in: int) -> int:
    """How many columns make a tile where ``fits`` would fit; the last one is no sliver."""
    most = min(max(fits, _LEAST_COLUMNS), _MOST_COLUMNS)
    return -(-d_in // -(-d_in // most))


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _scratch(base: torch.Tensor, *sizes: int) -> list[torch.Tensor]:
    """float64 memory that all tiles share: what is allocated anew is faulted in anew."""
    return [torch.empty(size, dtype=torch.float64, device=base.device) for size in sizes]


def _check(base: torch.Tensor, deltas: Sequence[LowRank], tile: int | None) -> None:
    if base.ndim != 2 or 0 in base.shape:
        raise ValueError(f"a base is a matrix that is not empty, not shape {tuple(base.shape)}")
    if base.dtype not in BASE_DTYPES:
        raise ValueError(f"a base is bfloat16, float16 or float32, not {base.dtype}")
    if tile is not None and tile < 1:
        raise ValueError(f"a tile has at least one column, not {tile}")
    for number, delta in enumerate(deltas):
        check_delta(delta, base.shape[0], base.shape[1], f"delta {number}")


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
