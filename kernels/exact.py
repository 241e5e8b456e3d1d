"""The fold of a few columns without any error: for values too near a rounding boundary.

Floats are integers times a power of two, and sums and products of those are again;
Python's integers hold them whole. Matrix products go through float64 all the same,
cut into limbs so small that no sum of their products can round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from .fold import LowRank

Integers = npt.NDArray[np.object_]  # of Python int, any size
Indices = npt.NDArray[np.int64]


class Dyadic(NamedTuple):
    """The array ``integers / 2**shift``, exactly."""

    integers: Integers
    shift: int


class ExactFold:
    """The same fold as :func:`patcher.kernels.fold`, in exact arithmetic, for a few values.

    Args:
        deltas: finite, the first acts first.
    """

    def __init__(self, deltas: Sequence[LowRank]) -> None:
        self._deltas = deltas

    @cached_property
    def _parts(self) -> list[tuple[Dyadic, Dyadic]]:
        return [(dyadic(delta.left), dyadic(delta.right)) for delta in self._deltas]

    def values(self, base: torch.Tensor, start: int, wanted: torch.Tensor) -> torch.Tensor:
        """Some values of the fold, cut to float64 with the last bit set where something is lost.

        That form ("rounded to odd") can be rounded once more, to any dtype of at
        most 51 bits, as if it were exact.

        Args:
            base: ``[d_out, t]``, columns of the base from ``start`` on; finite where wanted.
            start: the first of those columns.
            wanted: bool ``[d_out, t]``, at least one of them.

        Returns:
            float64 ``[n]`` on the CPU, in the order of ``base[wanted]``.
        """
        rows, columns = (index.cpu().numpy() for index in wanted.nonzero(as_tuple=True))
        numbers, columns = np.unique(columns, return_inverse=True)
        x = dyadic(base[:, torch.from_numpy(numbers).to(base.device)])
        for number, (delta, (left, right)) in enumerate(
            zip(self._deltas, self._parts, strict=True)
        ):
            if delta.kind == "multiplicative":
                inner = Dyadic(product(right.integers, x.integers), right.shift + x.shift)
            else:
                inner = Dyadic(right.integers[:, start + numbers], right.shift)
            shift = left.shift + inner.shift
            if number + 1 < len(self._deltas):
                x = _sum(x, Dyadic(product(left.integers, inner.integers), shift))
            else:
                change = _entries(left.integers, inner.integers, rows, columns)
                x = _sum(Dyadic(x.integers[rows, columns], x.shift), Dyadic(change, shift))
        return torch.tensor([_to_odd(n, x.shift) for n in x.integers], dtype=torch.float64)


def dyadic(t: torch.Tensor) -> Dyadic:
    """A matrix of floats as integers over one power of two; what is not finite counts as zero."""
    values = t.detach().to("cpu", torch.float64).numpy()
    fractions, exponents = np.frexp(np.where(np.isfinite(values), values, 0.0))
    integers = (fractions * 2.0**53).astype(np.int64)
    powers = exponents.astype(np.int64) - 53
    lowest = np.frexp((integers & -integers).astype(np.float64))[1] - 1  # of the set bits
    integers >>= np.maximum(lowest, 0)
    powers += np.maximum(lowest, 0)
    least = int(min(0, powers[integers != 0].min(initial=0)))
    return Dyadic(_shifted(integers, np.maximum(powers - least, 0)), -least)


def product(a: Integers, b: Integers) -> Integers:
    """``a @ b``, exactly."""
    # Limbs of `width` bits: a sum of n products of two stays below 2^53, so float64 holds it.
    width = (53 - a.shape[1].bit_length()) // 2
    result: Integers = np.zeros((a.shape[0], b.shape[1]), dtype=object)
    low = _limbs(b, width)
    for i, left in enumerate(_limbs(a, width)):
        for j, right in enumerate(low):
            result = result + ((left @ right).astype(np.int64).astype(object) << width * (i + j))
    return result


def _entries(a: Integers, b: Integers, rows: Indices, columns: Indices) -> Integers:
    """Some values of ``a @ b``, exactly; all of them are computed only where that is cheaper."""
    if len(rows) * a.shape[1] > 8 * a.shape[0] * b.shape[1]:
        return product(a, b)[rows, columns]
    result: Integers = (a[rows] * b[:, columns].T).sum(axis=1)
    return result


def _sum(a: Dyadic, b: Dyadic) -> Dyadic:
    shift = max(a.shift, b.shift)
    return Dyadic((a.integers << shift - a.shift) + (b.integers << shift - b.shift), shift)


def _limbs(a: Integers, width: int) -> list[npt.NDArray[np.float64]]:
    signs = np.sign(a).astype(np.float64)
    rest: Any = np.abs(a)
    limbs = []
    while rest.any():
        limbs.append((rest & ((1 << width) - 1)).astype(np.float64) * signs)
        rest = rest >> width
    return limbs


def _shifted(integers: npt.NDArray[np.int64], by: npt.NDArray[np.int64]) -> Integers:
    result: Integers = integers.astype(object) << by.astype(object)
    return result


def _to_odd(number: int, shift: int) -> float:
    """``number / 2**shift`` in 53 bits; what is cut off sets the last one."""
    size = abs(number)
    extra = max(0, size.bit_length() - 53)
    kept = size >> extra
    if kept << extra != size:
        kept |= 1
    try:
        value = math.ldexp(kept, extra - shift)
    except OverflowError:
        value = math.inf
    return -value if number < 0 else value
