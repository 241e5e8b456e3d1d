from __future__ import annotations

import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from patcher.kernels.rounding import round_to, same_bits, settled

from .oracle import SHAPES, rounded, same

DTYPES = sorted(SHAPES, key=str)


def near_boundaries() -> st.SearchStrategy[float]:
    """Doubles a few steps from a value, or from the middle between two, of a narrow dtype."""

    def build(high: int, step: int, negative: bool, exponent: int) -> float:
        bits = (exponent << 52) + (high << 39) + step  # 13 leading bits of the fraction, then a few
        value: float = struct.unpack("<d", struct.pack("<Q", bits))[0]
        return -value if negative else value

    exponents = st.one_of(st.integers(1023 - 160, 1023 + 130), st.integers(1023 - 30, 1023 + 18))
    return st.builds(build, st.integers(0, 8191), st.integers(-2, 2), st.booleans(), exponents)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(value=st.one_of(near_boundaries(), st.floats(allow_nan=False, allow_infinity=False)))
@example(value=1 + 2**-8 + 2**-40)
@example(value=1 + 2**-11 + 2**-40)
@example(value=-(2.0**-134))
@example(value=2.0**128 * (1 - 2**-9))
@example(value=65520.0)
@example(value=-1e-300)
def test_rounds_as_whole_numbers_do(dtype: torch.dtype, value: float) -> None:
    got = round_to(torch.tensor([value], dtype=torch.float64), dtype)
    want = rounded(Fraction(value), dtype)
    assert same(got.double(), torch.tensor([want], dtype=torch.float64)), (got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torch_alone_rounds_twice(dtype: torch.dtype) -> None:
    # Why rounding.py is there. Should torch mend this, the module can go.
    value = torch.tensor([1 + 2.0 ** -SHAPES[dtype][0] + 2**-40], dtype=torch.float64)
    assert value.to(dtype).item() == 1
    assert round_to(value, dtype).item() > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_knows_one_zero_infinities_and_nan(dtype: torch.dtype) -> None:
    inf = float("inf")
    got = round_to(torch.tensor([0.0, -0.0, inf, -inf, float("nan")], dtype=torch.float64), dtype)
    assert same(got[:4], torch.tensor([0.0, 0.0, inf, -inf], dtype=dtype))
    assert got[4].isnan()


def test_every_narrow_value_comes_back() -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = bits.view(dtype)
        numbers = ~values.isnan() & (bits != -(2**15))  # -0.0 becomes +0.0
        assert same(round_to(values.double(), dtype)[numbers], values[numbers])


def test_same_bits_tells_zeros_apart() -> None:
    a, b = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])
    assert same_bits(a, b).tolist() == [False, True]
    assert same_bits(a.half(), b.half()).tolist() == [False, True]


@given(st.lists(near_boundaries(), min_size=1), st.sampled_from([0.0, 2.0**-52, 2.0**-48, 2.0**-9]))
def test_what_is_settled_is_settled_rightly(values: list[float], width: float) -> None:
    middle = torch.tensor(values, dtype=torch.float64)
    low, high = middle - width * middle.abs(), middle + width * middle.abs()
    got, sure = settled(low, high)
    for x in (low + (high - low) * 0.01, middle, high - (high - low) * 0.01):
        inside = (low < x) & (x < high) & sure
        assert same(got[inside], round_to(x, torch.bfloat16)[inside])


def test_most_values_are_settled_at_once() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(1)).double()
    got, sure = settled(values - values.abs() * 2**-40, values + values.abs() * 2**-40)
    assert sure.float().mean() > 0.999
    assert same(got[sure], round_to(values, torch.bfloat16)[sure])


def test_zeros_subnormals_and_the_infinite_are_not_settled() -> None:
    odd = torch.tensor([0.0, -0.0, 2.0**-127, 1e39, float("inf"), float("nan")]).double()
    assert not settled(odd, odd)[1].any()
