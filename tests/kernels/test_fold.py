from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from patcher.kernels import LowRank, compose, fold

from .oracle import exact_fold, expected, same

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Kind = Literal["multiplicative", "additive"]
KINDS: st.SearchStrategy[Kind] = st.sampled_from(["multiplicative", "additive"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def matrix(seed: int, rows: int, columns: int, dtype: torch.dtype, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)


def delta(seed: int, kind: Kind, d_out: int, d_in: int, rank: int, scale: float = 0.5) -> LowRank:
    width = d_out if kind == "multiplicative" else d_in
    left = matrix(seed, d_out, rank, torch.float32, scale)
    right = matrix(seed + 1, rank, width, torch.float32, scale)
    return LowRank(kind, left, right)


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, list[LowRank]]:
    d_out, d_in = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    dtype = draw(st.sampled_from(DTYPES))
    base = matrix(
        draw(st.integers(0, 99)), d_out, d_in, dtype, draw(st.sampled_from([0.02, 1, 90]))
    )
    kinds = draw(st.lists(KINDS, max_size=3))
    deltas = [
        delta(draw(st.integers(100, 999)), kind, d_out, d_in, draw(st.integers(1, 4)),
              draw(st.sampled_from([1e-4, 0.1, 3.0])))
        for kind in kinds
    ]  # fmt: skip
    return base, deltas


@given(problems())
def test_is_the_exact_product_in_the_dtype_of_the_base(
    problem: tuple[torch.Tensor, list[LowRank]],
) -> None:
    base, deltas = problem
    if deltas:  # no deltas is the base itself, whose zeros keep their sign
        assert same(fold(base, deltas), expected(base, deltas))


@st.composite
def small_numbers(draw: st.DrawFn) -> tuple[torch.Tensor, list[LowRank]]:
    """Few bits everywhere, so that float64 is exact, and sums cancel and land on ties and zero."""
    d_out, d_in = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(DTYPES))
    numbers = st.sampled_from([0.0, 1.0, -1.0, 1.5, 0.25, -0.5, 3.0])

    def fill(rows: int, columns: int) -> torch.Tensor:
        cells = draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns))
        return torch.tensor(cells).reshape(rows, columns)

    def one(kind: Kind) -> LowRank:
        rank = draw(st.integers(1, 2))
        return LowRank(kind, fill(d_out, rank), fill(rank, d_in if kind == "additive" else d_out))

    deltas = [one(kind) for kind in draw(st.lists(KINDS, min_size=1, max_size=3))]
    return fill(d_out, d_in).to(dtype), deltas


@given(small_numbers())
def test_is_right_on_ties_and_zeros(problem: tuple[torch.Tensor, list[LowRank]]) -> None:
    base, deltas = problem
    assert same(fold(base, deltas), expected(base, deltas))


@dtypes
def test_nothing_is_rounded_before_the_end(dtype: torch.dtype) -> None:
    # Two bumps of a quarter of a step each: rounded one by one, both would be lost.
    quarter = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-25}[dtype]
    base = torch.full((1, 1), 1.0 + 4 * quarter, dtype=dtype)
    bump = LowRank("additive", torch.ones(1, 1), torch.tensor([[quarter]]))
    assert same(fold(base, [bump]), base)
    assert fold(base, [bump, bump]).item() > base.item()


@dtypes
def test_a_merge_by_plain_torch_gives_the_same_bits(dtype: torch.dtype) -> None:
    # What makes a live engine equal a checkpoint that somebody merged with their own code.
    base = matrix(1, 160, 640, dtype, 0.05)
    deltas = [delta(2, "multiplicative", 160, 640, 7, 0.1), delta(4, "additive", 160, 640, 5, 0.1)]
    x = base.double()
    x = x + deltas[0].left.double() @ deltas[0].right.double() @ x
    x = x + deltas[1].left.double() @ deltas[1].right.double()
    different = fold(base, deltas) != x.to(dtype)
    assert int(different.sum()) <= (1 if dtype == torch.float32 else 0)


@dtypes
def test_agrees_with_numpy_in_float64(dtype: torch.dtype) -> None:
    base = matrix(1, 48, 96, dtype, 0.05)
    deltas = [delta(2, "multiplicative", 48, 96, 7, 0.1), delta(4, "additive", 48, 96, 5, 0.1)]
    x = base.double().numpy()
    x = x + deltas[0].left.double().numpy() @ (deltas[0].right.double().numpy() @ x)
    x = x + deltas[1].left.double().numpy() @ deltas[1].right.double().numpy()
    error = np.abs(fold(base, deltas).double().numpy() - x)
    step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[dtype]
    assert (error <= np.abs(x) * step * (1 + 1e-9) + 2.0**-25).all()


@dtypes
def test_no_deltas_is_the_base_to_the_bit(dtype: torch.dtype) -> None:
    base = torch.tensor([[-0.0, 0.0, 1.0, float("inf"), float("nan"), 1e-40]]).to(dtype)
    result = fold(base, [])
    assert same(result, base)
    assert result.data_ptr() != base.data_ptr()


@dtypes
def test_what_remains_counts_not_how_it_came_about(dtype: torch.dtype) -> None:
    base = matrix(3, 24, 32, dtype, 0.1)
    pool = {
        "a": delta(10, "multiplicative", 24, 32, 3, 0.2),
        "b": delta(20, "additive", 24, 32, 3, 0.2),
        "c": delta(30, "multiplicative", 24, 32, 3, 0.2),
        "d": delta(40, "multiplicative", 24, 32, 3, 0.2),
    }
    live = base.clone()
    for order in itertools.permutations("abcd"):
        stack = list("abcd")
        for name in order:
            stack.remove(name)
            fold(base, [pool[n] for n in stack], out=live)
            assert same(live, fold(base.clone(), [pool[n] for n in stack]))
        assert same(live, base)


@given(problems(), st.data())
def test_any_shard_of_columns_folds_to_that_shard(
    problem: tuple[torch.Tensor, list[LowRank]], data: st.DataObject
) -> None:
    base, deltas = problem
    start = data.draw(st.integers(0, base.shape[1] - 1))
    stop = data.draw(st.integers(start + 1, base.shape[1]))
    shard = fold(base[:, start:stop], [d.columns(start, stop) for d in deltas])
    assert same(shard, fold(base, deltas)[:, start:stop])


@dtypes
def test_shards_of_a_large_weight(dtype: torch.dtype) -> None:
    base = matrix(5, 200, 960, dtype, 0.02)
    deltas = [
        delta(6, "multiplicative", 200, 960, 30, 0.06),
        delta(8, "additive", 200, 960, 4, 0.06),
        delta(9, "multiplicative", 200, 960, 30, 0.06),
    ]
    whole = fold(base, deltas)
    for ranks in (2, 3, 8):
        width = 960 // ranks
        for start in range(0, 960, width):
            stop = start + width
            shard = fold(base[:, start:stop], [d.columns(start, stop) for d in deltas])
            different = int((shard != whole[:, start:stop]).sum())
            # float64 sums in another order: one value in 10^7 may be at a float32's edge.
            assert different <= (2 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("tile", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tiles_threads_and_strides_make_no_difference(tile: int, dtype: torch.dtype) -> None:
    base = matrix(11, 96, 120, dtype, 0.02)
    deltas = [delta(12, "multiplicative", 96, 120, 20, 0.1)]
    want = fold(base, deltas)
    assert same(fold(base, deltas, tile=tile), want)
    assert same(fold(base.t().contiguous().t(), deltas, tile=tile), want)
    assert same(fold(torch.cat([base, base], 1)[:, 120:], deltas, tile=tile), want)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert same(fold(base, deltas, tile=tile), want)
    finally:
        torch.set_num_threads(threads)


@given(problems())
def test_composition_equals_the_product(problem: tuple[torch.Tensor, list[LowRank]]) -> None:
    base, deltas = problem
    deltas = [d for d in deltas if d.kind == "multiplicative"]
    if deltas:
        one = compose(deltas)
        assert one.left.shape[1] == sum(d.left.shape[1] for d in deltas)
        want = torch.tensor([[float(v) for v in row] for row in exact_fold(base, deltas)]).double()
        got = torch.tensor([[float(v) for v in row] for row in exact_fold(base, [one])]).double()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


def test_composes_additive_deltas_side_by_side() -> None:
    deltas = [delta(1, "additive", 5, 7, 2), delta(3, "additive", 5, 7, 3)]
    base = matrix(5, 5, 7, torch.bfloat16, 1)
    assert same(fold(base, [compose(deltas)]), fold(base, deltas))


def test_refuses_to_compose_what_has_no_such_form() -> None:
    a, b = delta(1, "multiplicative", 5, 7, 2), delta(3, "additive", 5, 7, 2)
    for wrong in ([], [a, b], [a, delta(1, "multiplicative", 6, 7, 2)]):
        with pytest.raises(ValueError, match="compose"):
            compose(wrong)


def test_writes_where_it_is_told_the_base_included() -> None:
    base = matrix(1, 6, 600, torch.bfloat16, 1)
    deltas = [delta(2, "multiplicative", 6, 600, 2)]
    want = fold(base, deltas)
    out = torch.empty(600, 6, dtype=torch.bfloat16).t()
    assert fold(base, deltas, out=out) is out
    assert same(out, want)
    fold(base, deltas, out=base)
    assert same(base, want)


def test_takes_parameters_and_leaves_no_graph() -> None:
    base = torch.nn.Parameter(matrix(1, 4, 4, torch.float32, 1))
    deltas = [delta(2, "multiplicative", 4, 4, 1)]
    deltas[0].left.requires_grad_()
    assert not fold(base, deltas).requires_grad
    fold(base, deltas, out=base)


def test_no_temporary_is_as_large_as_the_weight() -> None:
    sizes: list[int] = []

    def watch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            sizes.append(result.numel())
        return result

    mode: Any = type("Watch", (TorchDispatchMode,), {"__torch_dispatch__": watch})
    base = matrix(1, 32, 4096, torch.bfloat16, 1)
    deltas = [delta(2, "multiplicative", 32, 4096, 2)]
    out = torch.empty_like(base)
    with mode():
        fold(base, deltas, out=out, tile=64)
    assert 0 < max(sizes) <= 32 * 64


def test_beside_a_large_weight_an_eighth_of_it_is_held() -> None:
    held: list[int] = []

    def watch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format or func is torch.ops.aten._to_copy.default:
            held.append(result.nbytes)
        return result

    mode: Any = type("Watch", (TorchDispatchMode,), {"__torch_dispatch__": watch})
    base = torch.zeros(1024, 1 << 15, dtype=torch.bfloat16)
    out = torch.empty_like(base)
    for rank in (1, 300):
        held.clear()
        with mode():
            fold(base, [delta(2, "multiplicative", 1024, 1 << 15, rank)], out=out)
        assert 0 < sum(held) <= base.nbytes // 8, rank


@pytest.mark.parametrize("count", [2, 9, 60])
@pytest.mark.parametrize("kinds", ["multiplicative", "additive", "both"])
def test_a_deep_stack_is_the_product_in_its_order(count: int, kinds: str) -> None:
    # 60 of rank 3 are far beyond 40 rows: held dense by then.
    draw = np.random.default_rng(count)
    base = matrix(1, 40, 100, torch.bfloat16, 0.05)
    x = base.double().numpy()
    deltas = []
    for number in range(count):
        kind = ("multiplicative", "additive")[int(draw.integers(2))] if kinds == "both" else kinds
        one = delta(10 * number, cast(Kind, kind), 40, 100, 3, 0.1)
        left, right = one.left.double().numpy(), one.right.double().numpy()
        x = x + left @ (right @ x if kind == "multiplicative" else right)
        deltas.append(one)
    assert same(fold(base, deltas), torch.from_numpy(x).to(torch.bfloat16))
    reversed_ = fold(base, deltas[::-1])
    assert kinds == "additive" or not same(reversed_, fold(base, deltas))


def test_infinite_results_are_left_to_the_caller() -> None:
    base = torch.full((1, 1), 60000.0, dtype=torch.float16)
    twice = LowRank("multiplicative", torch.ones(1, 1), torch.ones(1, 1))
    assert fold(base, [twice]).isinf().all()
    odd = torch.tensor([[float("nan"), 1.0]], dtype=torch.float32)
    assert fold(odd, [twice]).isnan().tolist() == [[True, False]]


BASE = torch.zeros(4, 6, dtype=torch.bfloat16)
GOOD = delta(1, "multiplicative", 4, 6, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fold(BASE[0], []), "matrix"),
        (lambda: fold(BASE[:0], []), "not empty"),
        (lambda: fold(BASE.double(), []), "bfloat16, float16 or float32"),
        (lambda: fold(BASE, [], tile=0), "tile"),
        (lambda: fold(BASE, [delta(1, "multiplicative", 5, 6, 2)]), "does not fit"),
        (lambda: fold(BASE, [delta(1, "additive", 4, 5, 2)]), "does not fit"),
        (lambda: fold(BASE, [GOOD._replace(right=GOOD.right[:1])]), "does not fit"),
        (lambda: fold(BASE, [GOOD._replace(right=GOOD.right[0])]), "two matrices"),
        (lambda: fold(BASE, [GOOD._replace(left=GOOD.left.int())]), "floating"),
        (lambda: fold(BASE, [GOOD._replace(kind="other")]), "unknown kind"),  # type: ignore[arg-type]
        (lambda: fold(BASE, [GOOD], out=BASE.float()), "out is"),
        (lambda: fold(BASE, [GOOD], out=torch.empty(4, 5, dtype=torch.bfloat16)), "out is"),
        (lambda: fold(BASE[:3], [], out=BASE[1:]), "overlaps"),
    ],
)
def test_refuses_what_does_not_fit(call: Callable[[], torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
