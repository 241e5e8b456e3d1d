"""One correct rounding from float64 to the dtype that weights are served in."""

from __future__ import annotations

import torch


def round_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` (float64) in ``dtype``, rounded once, to nearest, ties to even; -0.0 becomes +0.0.

    ``x.to(torch.bfloat16)`` and ``x.to(torch.float16)`` go through float32 and
    round twice: 1 + 2^-8 + 2^-40 becomes 1, though 1 + 2^-7 is nearer. Going
    through a float32 that was rounded *to odd* is exact (Boldo & Melquiond,
    "Emulation of FMA and correctly rounded sums: proved algorithms using rounding
    to odd", 2008: two bits more than the target has are enough; float32 has 13).
    """
    x = x + 0.0  # the sign of an exact zero hangs on the order of summing
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


def settled(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``high`` in bfloat16, and where every value strictly between the two rounds to the same.

    A third of the work of :func:`round_to`; in exchange it settles neither zeros nor
    subnormal numbers, and no value that is not finite. Veltkamp's splitting rounds to
    the nearest 8 bits (Boldo, "Pitfalls of a full floating-point proof", 2006); which
    way it takes a tie does not matter, as neither end itself is a candidate.
    """
    a, b = _eight_bits(low), _eight_bits(high)
    bits = b.view(torch.int16)
    exponent = bits.bitwise_and(0x7F80)
    normal = (exponent != 0).logical_and_(exponent != 0x7F80)
    return b, normal.logical_and_(bits == a.view(torch.int16))


def _eight_bits(x: torch.Tensor) -> torch.Tensor:
    scaled = x * (2.0**45 + 1)
    return scaled.sub_(scaled - x).to(torch.bfloat16)  # exact now, but for subnormal numbers


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two tensors of one floating dtype agree to the bit, the sign of zero included."""
    integers = torch.int32 if a.element_size() == 4 else torch.int16
    return a.view(integers) == b.view(integers)
