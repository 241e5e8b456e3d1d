"""The closed forms against what they minimise, written out densely."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patcher.unlearn.gate import Strength, gate
from patcher.unlearn.methods import alphaedit, memit, published, rome
from patcher.unlearn.methods.orthogonal import imposed

D_OUT, D_IN = 5, 9


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=draw).double()


def moment(draw: torch.Generator, size: int = D_IN) -> torch.Tensor:
    root = drawn(draw, size, 2 * size)
    return root @ root.T / (2 * size)


seeds = st.integers(0, 10**6)
few = settings(deadline=None, max_examples=25)


@few
@given(seeds, st.integers(1, 4), st.sampled_from([0.5, 15.0, 15000.0]))
def test_memit_is_its_formula(seed: int, n: int, preserve: float) -> None:
    draw = numbers(seed)
    K, R, C = drawn(draw, D_IN, n), drawn(draw, D_OUT, n), moment(draw)
    found = R @ memit.write(K.T, C, preserve)
    wanted = R @ K.T @ torch.linalg.inv(preserve * memit.ridged(C) + K @ K.T)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


@few
@given(seeds, st.integers(1, 4))
def test_rome_is_one_edit_after_the_other(seed: int, n: int) -> None:
    draw = numbers(seed)
    W, K, C = drawn(draw, D_OUT, D_IN), drawn(draw, D_IN, n), moment(draw)
    change = drawn(draw, n, D_OUT)
    left, right = rome.in_sequence(K.T, change, C)
    values = (W @ K).T + change
    edited = W.clone()
    for i in range(n):
        direction = torch.linalg.inv(memit.ridged(C)) @ K[:, i]
        scale = (values[i] - edited @ K[:, i]) / (direction @ K[:, i])
        edited += torch.outer(scale, direction)
    torch.testing.assert_close(W + left @ right, edited, rtol=1e-6, atol=1e-7)
    last = edited @ K[:, -1]
    torch.testing.assert_close(last, values[-1])  # what was written last is there exactly


@few
@given(seeds, st.integers(1, 4))
def test_alphaedit_is_its_formula_and_leaves_the_rest_alone(seed: int, n: int) -> None:
    draw = numbers(seed)
    basis, _ = torch.linalg.qr(drawn(draw, D_IN, D_IN))
    sizes = torch.tensor([1e-6, 1e-5, 1e-4, 2e-4, 1.0, 2.0, 3.0, 4.0, 5.0]).double()
    C = basis @ torch.diag(sizes) @ basis.T
    K, R = drawn(draw, D_IN, n), drawn(draw, D_OUT, n)
    null = alphaedit.null_space(C)
    assert null.shape == (D_IN, 4)
    found = R @ alphaedit.write(K.T, null)
    P = basis[:, :4] @ basis[:, :4].T
    alpha = alphaedit.RIDGE * float((P @ K).square().sum()) / n
    eye = torch.eye(D_IN).double()
    wanted = R @ K.T @ P @ torch.linalg.inv(K @ K.T @ P + alpha * eye)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    assert (found @ basis[:, 4:]).abs().max() < 1e-8


@few
@given(seeds, st.integers(1, 3))
def test_as_published_is_the_formula_but_for_the_scale(seed: int, n: int) -> None:
    draw = numbers(seed)
    W, K, C = drawn(draw, D_OUT, D_IN), drawn(draw, D_IN, n), moment(draw)
    E, V, mu = drawn(draw, D_OUT, n), drawn(draw, D_OUT, n), 0.1 * drawn(draw, D_IN)
    weights = Strength(150.0, 50.0, 1.0)
    left, right = published.factors(W, K.T, E.T, V.T, C, mu, weights)
    assert left.shape == (D_OUT, 2 * n + 1)
    eye = torch.eye(D_OUT).double()
    v, _ = torch.linalg.qr(V)
    P = 1.01 * eye - v @ v.T
    centred = C - torch.outer(mu, mu)
    Y = 150 * W @ centred + 50 * (W @ K + E) @ K.T + W
    B = W @ (150 * C + 50 * K @ K.T + torch.eye(D_IN).double()) @ W.T
    D = P @ Y @ W.T @ torch.linalg.inv(B)
    torch.testing.assert_close(eye + left @ right, D - 0.01 * eye, rtol=1e-6, atol=1e-8)


def objective(
    delta: torch.Tensor, A: torch.Tensor, U: torch.Tensor, E: torch.Tensor, s: Strength
) -> torch.Tensor:
    kept = s.preserve * torch.trace(delta @ A @ delta.T)
    return kept + s.forget * (delta @ U - E).square().sum() + s.ridge * delta.square().sum()


@few
@given(seeds, st.integers(1, 4), st.sampled_from([0.1, 10.0, 1000.0]), st.booleans())
def test_orthogonality_is_the_constrained_minimum(
    seed: int, n: int, preserve: float, moved: bool
) -> None:
    draw = numbers(seed)
    W, K, C = drawn(draw, D_OUT, D_IN), drawn(draw, D_IN, n), moment(draw)
    E, A, U, weights = drawn(draw, D_OUT, n), W @ C @ W.T, W @ K, Strength(preserve, 50.0, 1.0)
    B = preserve * A + 50 * U @ U.T + torch.eye(D_OUT).double()
    R = 50 * U.T @ torch.linalg.inv(B)
    now = U + 0.3 * drawn(draw, D_OUT, n) if moved else U
    left, right = imposed(E, R, U, now, A, weights)
    assert left.shape == (D_OUT, 2 * n)
    delta = left @ right
    V = U / U.norm(dim=0)
    kept = (V * (now + delta @ now)).sum(0)
    torch.testing.assert_close(kept, torch.zeros(n).double(), rtol=0, atol=1e-6)
    # Any other edit that meets the constraints costs more: the objective is convex, so
    # that none near it is better says that none is.
    rows = torch.stack([torch.outer(V[:, i], now[:, i]).reshape(-1) for i in range(n)])
    free = torch.linalg.svd(rows, full_matrices=True).Vh[n:]
    least = objective(delta, A, U, E, weights)
    for _ in range(5):
        step = (free.T @ drawn(draw, len(free))).reshape(D_OUT, D_OUT)
        for size in (1e-3, 1.0):
            assert objective(delta + size * step, A, U, E, weights) > least * (1 - 1e-9)
    slope = 2 * (preserve * delta @ A + 50 * (delta @ U - E) @ U.T + delta)
    assert (free @ slope.reshape(-1)).abs().max() < 1e-5 * (1 + slope.abs().max())


@few
@given(seeds, st.integers(1, 3))
def test_orthogonality_that_holds_already_changes_nothing(seed: int, n: int) -> None:
    draw = numbers(seed)
    W, K, C = drawn(draw, D_OUT, D_IN), drawn(draw, D_IN, n), moment(draw)
    weights = Strength(10.0, 50.0, 1.0)
    plain = gate(W.float(), K.T.float(), C.float(), weights)
    U, R = W @ K, plain.right.double()
    E = -U @ torch.linalg.inv(R @ U)  # what makes (I + E R) U nought
    left, right = imposed(E, R, U, U, W @ C @ W.T, weights)
    torch.testing.assert_close(left @ right, E @ R, rtol=1e-5, atol=1e-6)


def test_facts_that_share_a_prompt_are_met_together() -> None:
    draw = numbers(3)
    W, k, C = drawn(draw, D_OUT, D_IN), drawn(draw, D_IN, 1), moment(draw)
    U = (W @ k).repeat(1, 2)
    zero = torch.zeros(D_OUT, 2).double()
    left, right = imposed(zero, zero.T, U, U, W @ C @ W.T, Strength(10.0, 50.0, 1.0))
    assert (U * (U + left @ (right @ U))).sum(0).abs().max() < 1e-6
