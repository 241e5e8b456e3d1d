from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patcher.kernels import LowRank, factors, fold, overlay

from .test_fold import delta, matrix

D_OUT, D_IN, TOKENS = 6, 8, 3


@given(st.lists(st.integers(0, 3), max_size=3), st.integers(0, 9), st.integers(1, 3))
def test_an_overlay_on_the_output_is_the_fold_of_the_weight(
    ranks: list[int], spare: int, ranks_of_tp: int
) -> None:
    deltas = [delta(9 * i, "multiplicative", D_OUT, D_IN, r) for i, r in enumerate(ranks)]
    weight = matrix(5, D_OUT, D_IN, torch.float32, 1).double()
    x = matrix(6, TOKENS, D_IN, torch.float32, 1).double()
    made = factors(deltas, D_OUT, sum(ranks) + spare)
    # Each tensor-parallel rank has some columns; its part of the sum may be overlaid by itself.
    shards = zip(weight.tensor_split(ranks_of_tp, 1), x.tensor_split(ranks_of_tp, 1), strict=True)
    got = sum(overlay(part @ shard.T, made) for shard, part in shards)
    want = weight
    for one in deltas:
        want = want + one.left.double() @ (one.right.double() @ want)
    torch.testing.assert_close(got, x @ want.T, rtol=1e-10, atol=1e-10)


def test_no_deltas_leave_every_bit() -> None:
    y = matrix(1, 40, D_OUT, torch.bfloat16, 3)
    assert torch.equal(overlay(y, factors([], D_OUT, 4).bfloat16()), y)


@pytest.mark.parametrize(
    "wrong",
    [
        delta(1, "additive", D_OUT, D_IN, 2),
        delta(1, "multiplicative", D_OUT + 1, D_IN, 2),
        delta(1, "multiplicative", D_OUT, D_IN, 5),
    ],
    ids=["additive", "other rows", "no room"],
)
def test_refuses_what_is_no_overlay(wrong: LowRank) -> None:
    with pytest.raises(ValueError, match="no overlay"):
        factors([wrong], D_OUT, 4)


def test_rounded_factors_act_as_the_fold_does() -> None:
    deltas = [
        delta(1, "multiplicative", 64, 96, 3, 0.2),
        delta(4, "multiplicative", 64, 96, 2, 0.2),
    ]
    base = matrix(5, 64, 96, torch.bfloat16, 0.1)
    x = matrix(6, 50, 96, torch.bfloat16, 1)
    folded = x.float() @ fold(base, deltas).float().T
    plain = x.float() @ base.float().T
    overlaid = overlay(plain.bfloat16(), factors(deltas, 64, 8).bfloat16()).float()
    assert (overlaid - folded).norm() < 0.02 * (folded - plain).norm()
