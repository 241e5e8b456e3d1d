from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patcher.unlearn.gate import Gate
from patcher.unlearn.slopes import Slopes
from patcher.unlearn.values import cost, metric, move, nonnegative

D, N, GUARD = 4, 3, 30.0


def slopes(draw: torch.Generator, prompts: int) -> Slopes:
    """Two tokens a prompt, in an order of no meaning."""
    row = torch.randperm(2 * prompts, generator=draw) % prompts
    outputs = torch.randn(2 * prompts, D, generator=draw)
    return Slopes(outputs, torch.randn(2 * prompts, N, generator=draw), row)


def dense(part: Slopes, prompts: int) -> torch.Tensor:
    """``[prompts, D N]``: each prompt's slope, written out."""
    result = torch.zeros(prompts, D, N).double()
    for outputs, gates, row in zip(*part, strict=True):
        result[row] += torch.outer(outputs, gates)
    return result.reshape(prompts, -1)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.0, 4.0), st.booleans())
def test_a_step_is_the_minimum_of_the_program_written_out(
    seed: int, pull: float, guarded: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(N, N + 2, generator=draw)
    gate = Gate(torch.zeros(N, D), (root @ root.T).double() + torch.eye(N))
    wishes, others = slopes(draw, 2), slopes(draw, 5)
    values = torch.randn(D, N, generator=draw)
    excess = torch.randn(2, generator=draw).double()
    form = metric({7: gate}, {7: others} if guarded else {}, GUARD)
    found = move({7: values}, excess, {7: wishes}, form, pull)[7].double().reshape(-1)

    V, G = dense(others, 5), dense(wishes, 2)
    M = torch.kron(torch.eye(D).double(), gate.cost)
    M += (GUARD / 5) * V.T @ V if guarded else 0
    start = values.double().reshape(-1)
    inverse = torch.linalg.inv(M)
    goal = (1 + pull) * excess.clamp(-1, 5) - G @ start
    a = nonnegative(G @ inverse @ G.T, goal)
    wanted = (pull * start - inverse @ G.T @ a) / (1 + pull)
    near = 1e-6 + 1e-3 * float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=near)
    # Every wish comes as far as it was asked to, to first order.
    moved = G @ (found - start)
    assert (moved <= -excess.clamp(-1, 5) + 1e-2 * (1 + moved.abs().max())).all()


def test_the_cost_is_a_sum_over_layers() -> None:
    gate = Gate(torch.zeros(N, D), torch.eye(N).double())
    form = metric({0: gate, 1: gate}, {}, GUARD)
    assert cost(form, {0: torch.ones(D, N), 1: 2 * torch.ones(D, N)}) == 5 * D * N
