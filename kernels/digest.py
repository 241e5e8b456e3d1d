"""Digests of tensors: which bits are these, whatever their strides or device."""

from __future__ import annotations

import hashlib
import math

import torch

# 48 = 2^4 * 3: its divisors are the usual tensor-parallel sizes (2, 3, 4, 6, 8, 12, 16, ...).
MAX_COLUMN_BLOCKS = 48
_CHUNK_BYTES = 8 * 1024 * 1024
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(t: torch.Tensor) -> str:
    """SHA-256, in hex, of a tensor's values.

    Hashes the row-major little-endian bytes of ``t`` in its own dtype, with ``-0.0`` as
    ``+0.0`` and bfloat16 subnormals as ``+0.0``. Strides, device and ``requires_grad`` make
    no difference, nor does the shape beyond the order of the values. A few MiB at most are
    copied at a time.

    Args:
        t: any shape; an integer or floating dtype of 1, 2, 4 or 8 bytes.

    Raises:
        ValueError: a dtype whose items have another size.
    """
    if t.element_size() not in _INT_OF_SIZE or t.is_complex() or t.is_quantized:
        raise ValueError(f"cannot digest a tensor of dtype {t.dtype}")
    sha = hashlib.sha256()
    rows = t.detach().reshape(1, -1) if t.ndim < 2 else t.detach().flatten(1)
    step = max(1, _CHUNK_BYTES // max(1, rows.shape[1] * t.element_size()))
    for start in range(0, rows.shape[0], step):
        chunk = _readable(rows[start : start + step].to("cpu")).contiguous()
        values = chunk.view(_INT_OF_SIZE[t.element_size()]).numpy()
        sha.update(values.astype(values.dtype.newbyteorder("<"), copy=False).data)
    return sha.hexdigest()


def _readable(t: torch.Tensor) -> torch.Tensor:
    """``t`` without what a weight packed for a CPU can't be read back with, and serves without."""
    if not t.is_floating_point():
        return t
    if t.dtype == torch.bfloat16:  # the bf16 units of CPUs take subnormals for zero
        t = torch.where(t.abs() < torch.finfo(t.dtype).tiny, 0, t)
    return t + 0.0


def column_digests(t: torch.Tensor, blocks: int) -> list[str]:
    """The digests of ``blocks`` equal groups of columns, left to right.

    So a shard of the columns can be checked against a manifest without the rest.

    Args:
        t: ``[d_out, d_in]``.
        blocks: how many groups; divides ``d_in``.

    Raises:
        ValueError: ``t`` is not a matrix, or ``blocks`` does not divide ``d_in``.
    """
    if t.ndim != 2:
        raise ValueError(f"column digests need a matrix, not shape {tuple(t.shape)}")
    d_in = t.shape[1]
    if blocks < 1 or d_in % blocks:
        raise ValueError(f"{blocks} blocks do not divide {d_in} columns")
    width = d_in // blocks
    return [digest(t[:, j * width : (j + 1) * width]) for j in range(blocks)]


def column_blocks(d_in: int) -> int:
    """How many column blocks a manifest carries for a weight of ``d_in`` columns."""
    if d_in < 1:
        raise ValueError(f"a weight has at least one column, not {d_in}")
    return math.gcd(d_in, MAX_COLUMN_BLOCKS)
