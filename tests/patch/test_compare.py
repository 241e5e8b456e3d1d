"""What ``compare`` says of pairs of patches, against the algebra that it stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patcher.errors import BaseMismatchError, UsageError
from patcher.patch import Delta, Patch
from patcher.patch.compare import Shared, Statistics, compare
from tests.golden.make_v1 import manifest, module

D, IN = 8, 12
M, N = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
Array = np.ndarray[Any, np.dtype[np.float64]]
seeds = st.integers(0, 10**6)


def patch(title: str = "t", weights: int = 1, **more: Any) -> Patch:
    deltas: dict[str, Delta] = more.pop("deltas")
    modules = {name: module((D, IN), "bfloat16", weights) for name in deltas}
    return Patch.build(manifest(title, modules).model_copy(update=more), deltas)


def pair(first: Delta, second: Delta, statistics: Statistics | None = None) -> Shared:
    two = [patch("a", deltas={M: first}), patch("b", deltas={M: second})]
    found = compare(two, None if statistics is None else {M: statistics})
    return found.pairs[0].modules[M]


def drawn(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def delta(draw: np.random.Generator, rank: int = 2, kind: str = "multiplicative") -> Delta:
    if kind == "additive":
        return Delta.additive(draw.normal(size=(D, rank)), draw.normal(size=(rank, IN)))
    return Delta.multiplicative(draw.normal(size=(D, rank)), draw.normal(size=(rank, D)))


def statistics(draw: np.random.Generator) -> Statistics:
    keys = draw.normal(size=(40, IN)) * np.linspace(0.2, 3, IN)
    return Statistics(draw.normal(size=(D, IN)), keys.T @ keys / 40)


kinds = st.sampled_from(["multiplicative", "additive"])


@given(seeds, kinds, kinds, st.booleans())
def test_the_overlap_is_symmetric_and_a_share(
    seed: int, kind: str, other: str, whitened: bool
) -> None:
    draw = drawn(seed)
    one, two = delta(draw, 2, kind), delta(draw, 3, other)
    under = statistics(draw) if whitened or kind != other else None
    there, back = pair(one, two, under), pair(two, one, under)
    assert there.overlap is not None
    assert back.overlap == pytest.approx(there.overlap, abs=1e-9)
    assert 0 <= there.overlap <= 1
    assert there.reads is not None
    assert 0 <= there.reads <= 1
    assert (there.reads == 0) == (other == "additive")


@given(seeds, st.booleans())
def test_orthogonal_inputs_are_zero_and_the_same_are_one(seed: int, whitened: bool) -> None:
    draw = drawn(seed)
    under = statistics(draw) if whitened else None
    metric = np.eye(D) if under is None else under.weight @ under.moment @ under.weight.T
    rows = np.linalg.qr(np.linalg.cholesky(metric).T @ draw.normal(size=(D, 4)))[0]
    rows = np.linalg.solve(np.linalg.cholesky(metric).T, rows)  # rowsᵀ metric rows = I
    one, two, again = (
        Delta.multiplicative(draw.normal(size=(D, 2)), part.T)
        for part in (rows[:, :2], rows[:, 2:], rows[:, :2] @ draw.normal(size=(2, 2)))
    )
    assert pair(one, two, under).overlap == pytest.approx(0, abs=1e-5)
    assert pair(one, again, under).overlap == pytest.approx(1, abs=1e-5)


@given(seeds, kinds, st.booleans())
def test_no_figure_depends_on_how_a_delta_is_factored(seed: int, kind: str, whitened: bool) -> None:
    draw = drawn(seed)
    one, two = delta(draw, 2, kind), delta(draw, 3)
    under = statistics(draw) if whitened or kind == "additive" else None
    turn = draw.normal(size=(2, 2)) + 3 * np.eye(2)
    make = Delta.additive if kind == "additive" else Delta.multiplicative
    other = make(one.left @ turn, np.linalg.solve(turn, one.right))
    for figure, wanted in vars(pair(one, two, under)).items():
        assert vars(pair(other, two, under))[figure] == pytest.approx(wanted, rel=1e-3), figure


@given(seeds)
def test_a_part_of_the_same_inputs_is_wholly_inside(seed: int) -> None:
    draw = drawn(seed)
    whole = delta(draw, 4)
    part = Delta.multiplicative(draw.normal(size=(D, 1)), whole.right[1:2])
    assert pair(whole, part).overlap == pytest.approx(1, abs=1e-6)


@given(seeds)
def test_the_disturbance_is_what_the_stack_does_at_the_inputs(seed: int) -> None:
    draw = drawn(seed)
    one, two = delta(draw, 2), delta(draw, 3)
    found = pair(one, two)
    a, b = (d.left.astype(float) @ d.right for d in (one, two))
    both = (np.eye(D) + b) @ (np.eye(D) + a)
    for delta_, alone, figure in (
        (one, np.eye(D) + a, found.second_on_first),
        (two, np.eye(D) + b, found.first_on_second),
    ):
        inputs = np.linalg.qr(delta_.right.astype(float).T)[0]
        wanted = np.linalg.norm((both - alone) @ inputs)
        wanted /= np.linalg.norm((alone - np.eye(D)) @ inputs)
        assert figure == pytest.approx(wanted, rel=1e-5)


def test_the_overlap_is_the_mean_square_cosine() -> None:
    angle = 0.3
    rows = np.zeros((2, D))
    rows[0, :2], rows[1, 2] = (np.cos(angle), np.sin(angle)), 1
    one = Delta.multiplicative(np.ones((D, 2)), np.eye(D)[[0, 3]])
    found = pair(one, Delta.multiplicative(np.ones((D, 2)), rows)).overlap
    assert found == pytest.approx(np.cos(angle) / np.sqrt(2), rel=1e-6)


def test_different_kinds_need_the_statistics() -> None:
    draw = drawn(1)
    one, two = delta(draw, 2, "additive"), delta(draw)
    found = compare([patch(deltas={M: one}), patch(deltas={M: two})]).pairs[0]
    assert (found.interference, found.verdict) == (None, "unknown")
    assert pair(one, two, statistics(draw)).overlap is not None


def test_a_gate_that_never_opens_is_in_nobodys_way() -> None:
    nothing = Delta.multiplicative(np.ones((D, 2)), np.zeros((2, D)))
    assert pair(nothing, delta(drawn(2))).overlap == 0


def test_verdicts() -> None:
    draw = drawn(3)
    one, like = delta(draw), delta(draw)
    lower = patch("lower", deltas={M: one})
    near = Delta.multiplicative(one.left, one.right + 0.05 * draw.normal(size=one.right.shape))
    cases = {
        "strong": patch("x", deltas={M: near}),
        "no shared module": patch("x", deltas={N: like}),
        "on top of the other": patch("x", deltas={M: like}, requires=(lower.id,)),
        "conflict": patch("x", deltas={M: like}, conflicts=(lower.id,)),
    }
    for wanted, other in cases.items():
        assert compare([lower, other]).pairs[0].verdict == wanted
        assert compare([other, lower]).pairs[0].verdict == wanted
    assert compare([lower, cases["no shared module"]]).pairs[0].interference is None


def test_all_pairs_of_three() -> None:
    draw = drawn(4)
    three = [patch(str(i), deltas={M: delta(draw), N: delta(draw)}) for i in range(3)]
    found = compare(three)
    assert [(p.first, p.second) for p in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    for one in found.pairs:
        squares = [(shared.overlap or 0) ** 2 for shared in one.modules.values()]
        assert one.interference == pytest.approx(np.sqrt(np.mean(squares)))


def test_what_can_not_be_compared() -> None:
    one = patch("a", deltas={M: delta(drawn(5))})
    for patches in ([], [one]):
        with pytest.raises(UsageError, match="nothing to compare"):
            compare(patches)
    with pytest.raises(UsageError, match="twice"):
        compare([one, patch("b", deltas={M: delta(drawn(6))}), one])
    with pytest.raises(BaseMismatchError, match="different weights"):
        compare([one, patch("b", weights=2, deltas={M: delta(drawn(5))})])
