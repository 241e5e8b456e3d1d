"""Digests of tensors: which bits are these, whatever their strides or device."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

# 48 = 2^4 * 3: its divisors are the usual tensor-parallel sizes (2, 3, 4, 6, 8, 12, 16, ...).
MAX_COLUMN_BLOCKS = 48
_CHUNK_BYTES = 256 * 1024  # what a chunk is looked through for stays in the cache for the hash
_WORD, _GROUP_BYTES = 8, 512
_ODD = -0x61C8864680B583EB  # 2^64 by the golden ratio, as int64: multiples of it lie far apart
_Bits: TypeAlias = npt.NDArray[Any]
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(t: torch.Tensor) -> str:
    """SHA-256, in hex, of a tensor's values.

    Hashes the row-major little-endian bytes of ``t`` in its own dtype, with ``-0.0`` as
    ``+0.0`` and bfloat16 subnormals as ``+0.0``. Strides, device and ``requires_grad`` make
    no difference, nor does the shape beyond the order of the values. 256 KiB or a row at
    most are copied at a time.

    Args:
        t: any shape; an integer or floating dtype of 1, 2, 4 or 8 bytes.

    Raises:
        ValueError: a dtype whose items have another size.
    """
    if t.element_size() not in _INT_OF_SIZE or t.is_complex() or t.is_quantized:
        raise ValueError(f"cannot digest a tensor of dtype {t.dtype}")
    sha = hashlib.sha256()
    # The bf16 units of CPUs take subnormals for zero, so a pack of them can't be read back.
    least = {torch.bfloat16: 0x80}.get(t.dtype, 1) if t.is_floating_point() else 0
    for bits in _chunks(t.detach()):
        before = sha.copy()
        sha.update(_bytes(bits))
        if not _is_plain(bits, least):  # asked after: hashing has brought it into the cache
            sha = before
            sha.update(_bytes(_plain(bits, least)))
    return sha.hexdigest()


def _chunks(t: torch.Tensor) -> Iterator[_Bits]:
    """``t``'s values in row-major order as whole numbers of their size, on the host."""
    kind = _INT_OF_SIZE[t.element_size()]
    if t.device.type == "cpu" and t.is_contiguous():
        flat = t.reshape(-1).view(kind).numpy()
        step = _CHUNK_BYTES // t.element_size()
        yield from (flat[start : start + step] for start in range(0, flat.size, step))
        return
    rows = t.reshape(1, -1) if t.ndim < 2 else t.flatten(1)
    step = max(1, _CHUNK_BYTES // max(1, rows.shape[1] * t.element_size()))
    for start in range(0, rows.shape[0], step):
        chunk = rows[start : start + step].to("cpu").contiguous()
        yield chunk.reshape(-1).view(kind).numpy()


def _bytes(bits: _Bits) -> memoryview:
    return bits.astype(bits.dtype.newbyteorder("<"), copy=False).data


def _is_plain(bits: _Bits, least: int) -> bool:
    """Whether no value is -0 or, but for +0, smaller than the one of the bits ``least``.

    The usual case, at the price of two looks. As whole numbers values are in the order of their
    size, negative ones from the least number on.
    """
    if not least or not bits.size:
        return True
    if bits.min() < np.iinfo(bits.dtype).min + least:
        return False
    # Taking 1 away makes 0 the largest of all.
    return bool(least == 1 or (bits.view(f"u{bits.dtype.itemsize}") - 1).min() >= least - 1)


def _plain(bits: _Bits, least: int) -> _Bits:
    """With +0 for those: a weight packed for a CPU serves and is read back without them."""
    size = bits & np.iinfo(bits.dtype).max
    return np.where(size < least, np.zeros_like(bits), bits)


def checksum(t: torch.Tensor) -> int:
    """A number that another tensor than ``t`` has once in 2⁶⁴, by accident; one read of ``t``.

    For telling that something else was loaded, written or damaged, not against somebody who
    means harm: that is what :func:`digest` is for. Made of the row-major bytes, where the
    tensor is: sums of 512 bytes as 64-bit words, each by its own odd number. An exchange of
    words within such a group goes unseen.

    Args:
        t: any shape, dtype, strides and device.
    """
    held = t.detach().contiguous().reshape(-1).view(torch.uint8)
    if held.storage_offset() % _WORD:
        held = held.clone()
    whole = held.numel() // _GROUP_BYTES * _GROUP_BYTES
    sums = held[:whole].view(torch.int64).view(-1, _GROUP_BYTES // _WORD).sum(1)
    sums = torch.cat([sums, held[whole:].to(torch.int64)])
    places = torch.arange(1, len(sums) + 1, device=held.device) * _ODD
    return int(((places | 1) * sums).sum()) + held.numel()  # zeros count, too


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
