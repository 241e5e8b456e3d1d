from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patcher.unlearn.gate import Strength, gate
from patcher.unlearn.values import nonnegative

STRENGTHS = st.builds(
    Strength,
    preserve=st.floats(1.0, 1e4),
    forget=st.floats(0.1, 1e3),
    ridge=st.floats(0.1, 10.0),
)


def problem(seed: int, n: int, d_out: int = 6, d_in: int = 9) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    W, K, E = (
        torch.randn(*shape, generator=draw) for shape in ((d_out, d_in), (n, d_in), (d_out, n))
    )
    data = torch.randn(40, d_in, generator=draw)
    return W, K, E, data.T @ data / len(data)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 4), STRENGTHS)
def test_the_closed_form_is_where_the_objective_has_no_slope(
    seed: int, n: int, strength: Strength
) -> None:
    W, K, E, C = problem(seed, n)
    delta = (E @ gate(W, K, C, strength).right).double().requires_grad_()
    W, U, E = W.double(), W.double() @ K.double().T, E.double()

    def objective(D: torch.Tensor) -> torch.Tensor:
        kept = strength.preserve * (D @ W @ C.double() @ W.T @ D.T).trace()
        wanted = strength.forget * (D @ U - E).square().sum()
        return kept + wanted + strength.ridge * D.square().sum()

    (slope,) = torch.autograd.grad(objective(delta), delta)
    scale = 2 * strength.forget * (E @ U.T).norm() + 1
    assert slope.norm() <= 2e-5 * scale
    assert objective(delta.detach() + 1e-2 * torch.randn(6, 6).double()) > objective(delta)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 4), STRENGTHS)
def test_it_is_the_designs_formula_and_its_rank_is_at_most_n(
    seed: int, n: int, strength: Strength
) -> None:
    W, K, E, C = (part.double() for part in problem(seed, n))
    U = W @ K.T
    B = W @ (strength.preserve * C + strength.forget * K.T @ K) @ W.T
    B += strength.ridge * torch.eye(6).double()
    wanted = strength.forget * E @ U.T @ torch.linalg.inv(B)
    found = E @ gate(W.float(), K.float(), C.float(), strength).right.double()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert torch.linalg.matrix_rank(found, rtol=1e-5) <= n


def test_the_cost_is_what_preserved_outputs_change_by() -> None:
    W, K, E, C = problem(3, 2)
    made = gate(W, K, C, Strength())
    A = (W @ C @ W.T).double()
    D = (E @ made.right).double()
    wanted = (D @ A @ D.T).trace() / (A.trace() / len(W))
    found = (E.double() @ made.cost @ E.double().T).trace()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_the_quadratic_program_meets_its_conditions(seed: int, n: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n + 2, generator=draw).double()
    h, b = root @ root.T, torch.randn(n, generator=draw).double()
    a = nonnegative(h, b)
    slope = h @ a - b
    assert (a >= 0).all()
    assert (slope >= -1e-3).all()  # nothing is gained by more of any
    assert (slope * a).abs().max() <= 1e-3 * (1 + a.max())  # nor by less of those in use
