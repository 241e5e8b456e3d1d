"""The method ``zero-gd``: ZeroUnlearn's gradient variant, for many facts.

After Lin et al. 2026, arXiv 2605.18879: three losses on each layer's ``D = I + Δ``,

    remap      mean |D u − (u + e)|² / mean |u|²     over the facts' outputs u = W k
    removal    mean (ûᵀ D u)² / mean |u|²            û = u / |u|
    preserve   tr(Δ A Δᵀ) / tr A                     A = W C Wᵀ

by Adam, over batches of facts, then cut to low rank. docs/methods.md says what differs from
the paper's code and why. Facts never meet in one system of equations: time and memory
are linear in their number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...patch import Delta
from ..job import Deltas, Job, Outcome
from ..preserved import preserved
from ..survivors import survivors
from ..targets import values
from .spread import Solve, spread

REMAP = 1.0
REMOVAL = 0.01  # against the remap, as in the paper's code
PRESERVE = 0.3
AT_ONCE = 64  # facts in a step
STEPS = 400
RATE = 0.02  # of the mean size of a whitened weight that would do all of the remap
SHARE = 0.1  # of the facts' own moment in the whitening, beside what is preserved
TOLERANCE = 0.02  # of the edit, relative, that cutting to low rank may cost
STRONGER = 2.0  # by which a surviving fact's loss grows from round to round


class Trained(NamedTuple):
    """``Δ M^(1/2)`` ``[d_out, d_out]`` float64, and ``M^(-1/2)``."""

    whitened: torch.Tensor
    back: torch.Tensor


class Factored(NamedTuple):
    """``Δ ≈ left right``; ``error``: what is cut off, relative, both under ``M``."""

    left: torch.Tensor
    right: torch.Tensor
    error: float


def zero_gd(job: Job) -> Outcome:
    """One multiplicative delta a layer; rank: as few as ``TOLERANCE`` allows, 2n at most."""
    layers = sorted(job.settings.layers)
    kept = preserved(job, layers)
    change = _wanted(job, layers[-1])
    emphasis = torch.ones(len(job.facts), device=job.model.device)
    errors: dict[int, float] = {}
    deltas: Deltas = {}
    for turn in range(job.settings.rounds):
        solve = _solver(job, kept, emphasis, errors, turn)
        deltas = spread(job, layers, change, solve)
        left = survivors(job, deltas)
        if not left:
            break
        again = sorted({*left.still, *(wish.fact for wish in left.leaks)})
        emphasis[again] *= STRONGER
        change[again] *= 1.25
    return Outcome(
        deltas,
        {
            "remap": REMAP,
            "removal": REMOVAL,
            "preserve_weight": PRESERVE,
            "training_steps": STEPS,
            "factored_error": round(max(errors.values()), 6),
        },
    )


def _wanted(job: Job, layer: int) -> torch.Tensor:
    """The target values ``[n, d_out]``, kept in the journal: with many facts they take longest."""
    kept = job.journal.load("gd-values")
    if kept is not None and "change" in kept and len(kept["change"]) == len(job.facts):
        return kept["change"].to(job.model.device)
    change = values(job, layer)
    job.journal.save("gd-values", {"change": change})
    return change


def _solver(
    job: Job,
    kept: dict[int, torch.Tensor],
    emphasis: torch.Tensor,
    errors: dict[int, float],
    turn: int,
) -> Solve:
    """One layer's edit; ``errors`` gets what cutting it to low rank cost."""

    def solve(layer: int, keys: torch.Tensor, wanted: torch.Tensor) -> Delta:
        W = job.model.weight(job.model.module_name(layer))
        A = W.double() @ kept[layer].to(W.device, torch.float64) @ W.double().T
        found = descend(job, keys @ W.T, wanted, A, emphasis, f"gd-{turn}-{layer}")
        cut = factored(found, min(2 * len(job.facts), len(W)))
        errors[layer] = cut.error
        return Delta.multiplicative(cut.left, cut.right, job.settings.stored)

    return solve


def descend(
    job: Job,
    outputs: torch.Tensor,
    wanted: torch.Tensor,
    moment: torch.Tensor,
    emphasis: torch.Tensor,
    entry: str,
) -> Trained:
    """One layer's ``Δ`` by Adam over batches of facts.

    What moves is ``Δ M^(1/2)``, with ``M`` the preserved moment and a tenth of the facts':
    there all directions are alike to what is preserved, and Adam converges.

    Args:
        job: seed, journal, progress.
        outputs: ``Uᵀ [n, d_out]``.
        wanted: ``Eᵀ [n, d_out]``.
        moment: ``A [d_out, d_out]`` float64.
        emphasis: ``[n]``, by which a fact's losses count more.
        entry: the name in the journal.
    """
    U, E, weigh = outputs.double(), wanted.double(), emphasis.double()
    size = U.square().sum(1).mean()
    back = _inverse_root(moment, U)
    own = U / U.norm(dim=1, keepdim=True).clamp_min(1e-30)
    white = U @ back  # [n, d_out]
    # tr(Δ A Δᵀ) = |Δ M^(1/2) (M^(-1/2) A^(1/2))|², with tr A for its scale
    shape = back @ moment @ back / moment.trace()
    G = torch.zeros_like(moment).requires_grad_()
    step_size = RATE * float((E.norm(dim=1) / white.norm(dim=1).clamp_min(1e-30)).mean())
    step_size /= len(moment) ** 0.5
    adam = torch.optim.Adam([G], lr=max(step_size, 1e-12))
    begun = _restore(job, entry, G, adam)
    job.progress.start("Training", STEPS)
    for step in range(begun, STEPS):
        draw = torch.Generator().manual_seed((job.settings.seed * 1_000_003 + step) % 2**63)
        rows = torch.randperm(len(U), generator=draw)[:AT_ONCE].to(U.device)
        adam.param_groups[0]["lr"] = max(step_size, 1e-12) * (0.2 if step > 0.6 * STEPS else 1.0)
        with torch.enable_grad():
            acted = white[rows] @ G.T  # Δ u
            miss = ((acted - E[rows]).square().sum(1) * weigh[rows]).mean() / size
            along = ((own[rows] * (U[rows] + acted)).sum(1).square() * weigh[rows]).mean() / size
            stay = ((G @ shape) * G).sum()
            loss = REMAP * miss + REMOVAL * along + PRESERVE * stay
        (G.grad,) = torch.autograd.grad(loss, G)
        adam.step()
        if (step + 1) % 100 == 0:
            moments = adam.state[G]
            kept = {"G": G, "step": torch.tensor(step + 1)}
            kept |= {key: moments[key] for key in ("exp_avg", "exp_avg_sq")}
            job.journal.save(entry, kept)
        job.progress.step(step + 1, f"loss {loss.item():.4f}")
    job.progress.finish()
    return Trained(G.detach(), back)


def factored(trained: Trained, most: int) -> Factored:
    """The nearest of low rank under ``M``: as small as ``TOLERANCE`` allows, ``most`` at most."""
    left, sizes, right = torch.linalg.svd(trained.whitened)
    total = float(sizes.square().sum())
    beyond = (total - sizes.square().cumsum(0)).clamp(min=0) / max(total, 1e-300)
    rank = min(most, int((beyond.sqrt() > TOLERANCE).sum()) + 1)
    error = float(beyond[rank - 1].sqrt())
    half = sizes[:rank].sqrt()
    return Factored(left[:, :rank] * half, half[:, None] * right[:rank] @ trained.back, error)


def _inverse_root(moment: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """``M^(-1/2)``, with eigenvalues below a millionth of their mean raised to it."""
    own = outputs.T @ outputs / len(outputs)
    M = moment / moment.trace() + SHARE * own / own.trace()
    sizes, vectors = torch.linalg.eigh(M)
    roots = sizes.clamp(min=1e-6 * float(sizes.mean())).sqrt()
    inverse: torch.Tensor = (vectors / roots) @ vectors.T
    return inverse


@torch.no_grad()
def _restore(job: Job, entry: str, G: torch.Tensor, adam: torch.optim.Adam) -> int:
    kept = job.journal.load(entry)
    if kept is None or "G" not in kept or kept["G"].shape != G.shape:
        return 0
    G.copy_(kept["G"])
    moments = {key: kept[key].to(G) for key in ("exp_avg", "exp_avg_sq")}
    adam.state[G] = {"step": torch.tensor(float(kept["step"])), **moments}
    return int(kept["step"])
