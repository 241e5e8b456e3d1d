"""``zero --orthogonal``: the paper's orthogonality, on the inputs that are to be forgotten.

ZeroUnlearn (Lin et al. 2026, arXiv 2605.18879) takes the original representation out of the
output of every token. Here each fact's own output, and nothing else, is to be orthogonal to
its original ``vᵢ = uᵢ / |uᵢ|``, as a constraint of ``zero``'s least squares:

    minimise  λ_w tr(Δ A Δᵀ) + λ_f |Δ U − E|² + λ |Δ|²   subject to  vᵢᵀ (I + Δ) uᵢ = 0

With ``Δ₀`` the unconstrained minimum and ``B = λ_w A + λ_f U Uᵀ + λ I`` the objective is
``tr((Δ − Δ₀) B (Δ − Δ₀)ᵀ)`` and a constant, so with one multiplier a fact

    Δ = Δ₀ − V diag(ν) Uᵀ B⁻¹,   ((VᵀV) ∘ (Uᵀ B⁻¹ U)) ν = diag(Vᵀ (I + Δ₀) U)

of rank at most ``2n``. The matrix is positive semidefinite, by Schur's product theorem.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...patch import Delta
from ..forward import as_edit, folded, keys
from ..gate import Strength
from ..job import Deltas, Job, Outcome
from ..preserved import preserved
from .zero import zero


def orthogonal(job: Job) -> Outcome:
    """``zero``'s deltas, each with the correction; rank: twice the number of facts.

    From the lowest layer up, on the outputs that the edits below leave: what is served is
    orthogonal, not only what each layer would do alone.
    """
    settings = replace(job.settings, orthogonal=False)
    plain = zero(replace(job, settings=settings, augmented=(), reworded=()))  # rank n
    model, layers = job.model, sorted(job.settings.layers)
    kept = preserved(job, layers)
    prompts, places = [e.prompt for e in job.encoded], [e.subject for e in job.encoded]
    original = keys(model, prompts, places, layers)
    deltas: Deltas = {}
    for layer in layers:
        name = model.module_name(layer)
        with folded(model, as_edit(deltas)):
            now = keys(model, prompts, places, [layer])[layer]
        W = model.weight(name).double()
        start = plain.deltas[name].to_torch()
        left, right = imposed(
            start.left,
            start.right,
            W @ original[layer].T.to(W),
            W @ now.T.to(W),
            W @ kept[layer].to(W) @ W.T,
            job.settings.strength,
        )
        deltas[name] = Delta.multiplicative(left, right, job.settings.stored)
    return Outcome(deltas, plain.hyperparameters)


def imposed(
    left: torch.Tensor,
    right: torch.Tensor,
    original: torch.Tensor,
    now: torch.Tensor,
    preserved: torch.Tensor,
    strength: Strength,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of ``Δ``, the constrained minimum, ``[d_out, r + n]`` and ``[r + n, d_out]``.

    Args:
        left: ``[d_out, r]``, of ``Δ₀``, the unconstrained one.
        right: ``[r, d_out]``.
        original: ``U [d_out, n]`` float64, what the facts' outputs were.
        now: what they are before this edit: the same, but for the edits of other layers.
        preserved: ``A [d_out, d_out]``.
        strength: the objective's weights.
    """
    U, A = original, preserved
    L, R = left.to(U), right.to(U)
    B = strength.preserve * A + strength.forget * U @ U.T + strength.ridge * torch.eye(len(U)).to(U)
    V = U / U.norm(dim=0).clamp_min(1e-30)
    S = torch.linalg.solve(B, now).T
    missed = (V * (now + L @ (R @ now))).sum(0)
    # Facts of one prompt make it singular, and are met together.
    nu = torch.linalg.pinv((V.T @ V) * (S @ now), rtol=1e-12, hermitian=True) @ missed
    return torch.cat([L, -V * nu], 1), torch.cat([R, S])
