"""One correct rounding from float64 to the dtype that weights are served in."""

from __future__ import annotations

import torch


def round_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` (float64) in ``dtype``, rounded once, to nearest, ties to even.

    ``x.to(torch.bfloat16)`` and ``x.to(torch.float16)`` go through float32 and
    round twice: 1 + 2^-8 + 2^-40 becomes 1, though 1 + 2^-7 is nearer. Going
    through a float32 that was rounded *to odd* is exact (Boldo & Melquiond,
    "Emulation of FMA and correctly rounded sums: proved algorithms using rounding
    to odd", 2008: two bits more than the target has are enough; float32 has 13).
    """
    if dtype == torch.float32:
        return x.to(torch.float32)
    return _to_odd(x).to(dtype)


def _to_odd(x: torch.Tensor) -> torch.Tensor:
    """float64 to float32: what cannot be held is cut off, with the last bit set."""
    nearest = x.to(torch.float32)
    back = nearest.to(torch.float64)
    bits = nearest.view(torch.int32)
    # The integer view of a float counts its magnitude upwards, for either sign.
    bits.sub_((back.abs() > x.abs()).to(torch.int32))
    bits.bitwise_or_((back != x).to(torch.int32))
    return nearest
