"""What an edit writes: the smallest changes ``E`` that make the model stop answering.

With the gates fixed, what the model says is a smooth function of ``E``. This solves

    minimise  Σ_layers tr(E cost Eᵀ) + (guard/N) Σ_others (slope · E)²
    subject to every wish

where the *others* are N prompts about other subjects and ``slope`` is how the
log-probability of the model's answer to one moves with ``E``. By sequential quadratic
programming: run the model with the edit in place, linearise wishes in one backward
pass, solve the quadratic program in its dual (one unknown a wish), move a part of the
way, repeat. docs/methods.md, "Target values".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .gate import Gate
from .linearised import Linearised
from .progress import Progress
from .slopes import Slopes, Values, Wish

SLACK = 0.5  # nats by which a wish may be missed and still count as met
STRIDE = 5.0  # nats that a wish is moved by one step, at most
RELAX = 1.0  # nats that a wish that is more than met may come back in one step


@dataclass(frozen=True)
class Metric:
    """The quadratic form that is minimised, ready to be inverted.

    ``inverse``: ``cost⁻¹ [n, n]`` by layer. ``others``: slopes of the guarded prompts,
    numbered from 0. ``solve`` ``[N, N]`` float64: ``(N/guard I + others cost⁻¹ othersᵀ)⁻¹``.
    """

    costs: dict[int, torch.Tensor]
    inverse: dict[int, torch.Tensor]
    others: dict[int, Slopes]
    solve: torch.Tensor


def metric(gates: dict[int, Gate], others: dict[int, Slopes], guard: float) -> Metric:
    """The metric of those gates; ``others`` is empty where nothing is guarded."""
    inverse = {layer: torch.linalg.inv(gate.cost).float() for layer, gate in gates.items()}
    count = 1 + int(next(iter(others.values())).row.max()) if others and guard > 0 else 0
    both = torch.zeros(count, count, dtype=torch.float64)
    for layer, part in others.items() if count else ():
        both += products(part, part, inverse[layer], count, count)
    both += torch.eye(count, dtype=torch.float64) * (count / guard if count else 1.0)
    costs = {layer: gate.cost for layer, gate in gates.items()}
    return Metric(costs, inverse, others if count else {}, torch.linalg.inv(both))


def least_change(
    seen: Linearised,
    wishes: Sequence[Wish],
    values: Values | None,
    form: Metric,
    *,
    steps: int,
    progress: Progress,
) -> Values:
    """The values that meet the wishes at the least cost that ``steps`` steps find.

    What meets them is told by :class:`Linearised`: in part foretold. Who needs to know asks the
    model with the values in place.

    Args:
        seen: what the unpatched model does with the gates; keeps what it has seen.
        wishes: at least one.
        values: to start from; None: none at all.
        form: from :func:`metric`.
        steps: at most; each takes a pass through the model, forward and back, with those
            wishes that have moved.
        progress: told the steps, with the worst miss in nats.
    """
    fresh = values is None
    values = seen.start() if values is None else values
    best, best_rank = values, (float("inf"), float("inf"))
    for step in range(steps):
        excess = seen.look(wishes, values)
        missed = (excess - SLACK).clamp(min=0).sum().item()
        rank = (missed, cost(form, values))
        progress.step(step + 1, f"worst miss {max(0.0, excess.max().item()):.1f} nats")
        settled = missed == 0 == best_rank[0] and rank[1] > 0.97 * best_rank[1]
        if rank < best_rank:
            best, best_rank = values, rank
        if settled or step == steps - 1:
            break
        # The further along, the shorter the step: the wishes are not quite linear.
        pull = 0.0 if fresh and step == 0 else max(2.0, float(step))
        values = move(values, excess, seen.slopes, form, pull)
    return best


def cost(form: Metric, values: Values) -> float:
    """``Σ_layers tr(E cost Eᵀ)``: the mean square change of preserved outputs, relative."""
    return sum(
        float(torch.einsum("dn,nm,dm->", E.double(), form.costs[layer], E.double()))
        for layer, E in values.items()
    )


@torch.no_grad()
def move(
    values: Values, excess: torch.Tensor, slopes: dict[int, Slopes], form: Metric, pull: float
) -> Values:
    """One step: the dual of the linearised program, solved, and the values that it gives.

    With the metric ``M``, ``h = slope M⁻¹ slopeᵀ`` and multipliers ``a ≥ 0``, the minimum
    of ``M(E) + pull·M(E − E₀)`` is ``E = (pull E₀ − Σ a slope M⁻¹) / (1 + pull)``.
    """
    n, guarded = len(excess), len(form.solve)
    h = torch.zeros(n, n, dtype=torch.float64)
    shared = torch.zeros(n, guarded, dtype=torch.float64)
    now = torch.zeros(n, dtype=torch.float64)
    for layer, part in slopes.items():
        h += products(part, part, form.inverse[layer], n, n)
        if guarded:
            shared += products(part, form.others[layer], form.inverse[layer], n, guarded)
        along = ((part.outputs @ values[layer]) * part.gates).sum(1).double().cpu()
        now.index_add_(0, part.row, along)
    h -= shared @ form.solve @ shared.T
    aim = excess.clamp(min=-RELAX, max=STRIDE)
    a = nonnegative(h, (1 + pull) * aim - now)
    back = -(form.solve @ (shared.T @ a))
    moved: Values = {}
    for layer, part in slopes.items():
        step = _combined(part, a)
        if guarded:
            step = step + _combined(form.others[layer], back)
        moved[layer] = (pull * values[layer] - step @ form.inverse[layer]) / (1 + pull)
    return moved


def _combined(part: Slopes, weights: torch.Tensor) -> torch.Tensor:
    """``Σ weights[row] slope[row]`` ``[d_out, n]``."""
    own = weights[part.row].to(part.outputs)[:, None]
    return (part.outputs * own).T @ part.gates


def products(
    left: Slopes, right: Slopes, inverse: torch.Tensor, rows: int, columns: int, chunk: int = 1024
) -> torch.Tensor:
    """``[rows, columns]`` float64: inner products ``left cost⁻¹ rightᵀ`` of slopes."""
    gated = left.gates @ inverse
    result = torch.zeros(rows, columns, dtype=torch.float64)
    for begin in range(0, len(left.row), chunk):
        piece = slice(begin, begin + chunk)
        both = (left.outputs[piece] @ right.outputs.T) * (gated[piece] @ right.gates.T)
        summed = torch.zeros(len(both), columns, dtype=torch.float64)
        summed.index_add_(1, right.row, both.double().cpu())
        result.index_add_(0, left.row[piece], summed)
    return result


def nonnegative(h: torch.Tensor, b: torch.Tensor, sweeps: int = 2000) -> torch.Tensor:
    """The ``a ≥ 0`` that minimises ``aᵀ h a / 2 − b a``, for ``h [n, n]`` positive definite.

    Coordinate descent in float64, which for this problem converges from anywhere.
    """
    ridge = h.diagonal().clamp(min=0) * 1e-6 + 1e-30
    H = (h + torch.diag(ridge)).numpy()
    residual = b.double().numpy().copy()  # b - H a
    a = torch.zeros(len(b), dtype=torch.float64).numpy()
    for _ in range(sweeps):
        largest = 0.0
        for i in range(len(a)):
            change = max(-a[i], residual[i] / H[i, i])
            if change:
                a[i] += change
                residual -= H[i] * change
                largest = max(largest, abs(change))
        if largest <= 1e-9 * max(1.0, a.max()):
            break
    return torch.from_numpy(a)
