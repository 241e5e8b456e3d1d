"""The method ``memit``: many facts written into several layers at once.

Meng et al. 2023, arXiv 2210.07229, equation 14: with keys ``K [d_in, n]``, wanted changes
``R [d_out, n]`` and the preserved moment ``C``, ``Δ = R Kᵀ (λ C + K Kᵀ)⁻¹`` minimises
``λ tr(Δ C Δᵀ) + |Δ K − R|²``. With ``X = (λ C)⁻¹ K`` it is ``R (I + Kᵀ X)⁻¹ Xᵀ``, of rank n.
"""

from __future__ import annotations

import torch

from ...patch import Delta
from ..job import Job, Outcome
from ..preserved import preserved
from ..targets import values
from .spread import spread

PRESERVE = 15.0  # λ; the paper's 15,000 is for sums over a hundred thousand texts' tokens
RIDGE = 1e-6  # of C's mean eigenvalue: few tokens leave C singular


def memit(job: Job) -> Outcome:
    """One additive delta a layer; rank: the number of facts."""
    layers = sorted(job.settings.layers)
    kept = preserved(job, layers)
    change = values(job, layers[-1])

    def solve(layer: int, keys: torch.Tensor, wanted: torch.Tensor) -> Delta:
        right = write(keys, kept[layer], PRESERVE)
        return Delta.additive(wanted.T, right, job.settings.stored)

    deltas = spread(job, layers, change, solve)
    return Outcome(deltas, {"preserve": PRESERVE})


def write(keys: torch.Tensor, moment: torch.Tensor, preserve: float) -> torch.Tensor:
    """``Kᵀ (λ C + K Kᵀ)⁻¹ [n, d_in]`` float64, of ``Kᵀ [n, d_in]`` and ``C [d_in, d_in]``."""
    K = keys.double().T
    X = torch.linalg.solve(preserve * ridged(moment.to(K)), K)
    eye = torch.eye(K.shape[1]).to(K)
    written: torch.Tensor = torch.linalg.solve(eye + K.T @ X, X.T)
    return written


def ridged(moment: torch.Tensor) -> torch.Tensor:
    """``C`` with a millionth of its mean eigenvalue more, so that it can be inverted."""
    eye = torch.eye(len(moment)).to(moment)
    return moment + RIDGE * moment.trace() / len(moment) * eye
