"""What a fold must give, from Python's fractions: slow, and nothing shared with the code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch

from patcher.kernels import LowRank

# dtype: (bits of precision, least exponent, greatest exponent) of IEEE 754 and bfloat16.
SHAPES = {
    torch.bfloat16: (8, -126, 127),
    torch.float16: (11, -14, 15),
    torch.float32: (24, -126, 127),
}
Matrix = list[list[Fraction]]


def fractions(t: torch.Tensor) -> Matrix:
    return [[Fraction(value) for value in row] for row in t.double().tolist()]


def times(a: Matrix, b: Matrix) -> Matrix:
    columns = list(zip(*b, strict=True))
    return [
        [sum(map(Fraction.__mul__, row, column), Fraction()) for column in columns] for row in a
    ]


def plus(a: Matrix, b: Matrix) -> Matrix:
    return [[x + y for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]


def exact_fold(base: torch.Tensor, deltas: Sequence[LowRank]) -> Matrix:
    result = fractions(base)
    for delta in deltas:
        left, right = fractions(delta.left), fractions(delta.right)
        inner = times(right, result) if delta.kind == "multiplicative" else right
        result = plus(result, times(left, inner))
    return result


def rounded(value: Fraction, dtype: torch.dtype) -> float:
    """Nearest, ties to even, with subnormals and infinity, on whole numbers alone."""
    precision, least, greatest = SHAPES[dtype]
    if not value:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, least) - precision + 1)
    nearest = round(size / quantum) * quantum  # Python rounds ties to even
    result = math.inf if nearest >= Fraction(2) ** (greatest + 1) else float(nearest)
    return math.copysign(result, value)


def _through_float32(value: Fraction, dtype: torch.dtype) -> float:
    single = rounded(value, torch.float32)
    return rounded(Fraction(single), dtype) if math.isfinite(single) else single


def expected(base: torch.Tensor, deltas: Sequence[LowRank]) -> torch.Tensor:
    rows = [[_through_float32(v, base.dtype) for v in row] for row in exact_fold(base, deltas)]
    return torch.tensor(rows, dtype=torch.float64).to(base.dtype)  # holds them exactly


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit: the sign of zero and NaNs included."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    bits = [t.contiguous().view(integers) for t in (a, b)]
    return a.dtype == b.dtype and torch.equal(*bits)
