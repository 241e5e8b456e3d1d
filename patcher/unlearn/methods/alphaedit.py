"""The method ``alphaedit``: an edit that acts only where what is preserved has no energy.

Fang et al. 2025, arXiv 2410.02355, equation 14: with ``P`` the projector on the
eigenvectors of the preserved moment with the smallest eigenvalues,
``Δ = R Kᵀ P (K Kᵀ P + α I)⁻¹``. As ``P`` is symmetric and its own square, that is
``R (Kᵀ P K + α I)⁻¹ (P K)ᵀ``, of rank n; no matrix ``[d_in, d_in]`` is inverted.
"""

from __future__ import annotations

import torch

from ...patch import Delta
from ..job import Job, Outcome
from ..preserved import preserved
from ..targets import values
from .spread import spread

SHARE = 0.02  # of the preserved keys' energy: what the null space may hold of it
RIDGE = 0.01  # α, of the mean square of the facts' keys within the null space


def alphaedit(job: Job) -> Outcome:
    """One additive delta a layer; rank: the number of facts."""
    layers = sorted(job.settings.layers)
    bases = {layer: null_space(moment) for layer, moment in preserved(job, layers).items()}
    change = values(job, layers[-1])

    def solve(layer: int, keys: torch.Tensor, wanted: torch.Tensor) -> Delta:
        right = write(keys, bases[layer])
        return Delta.additive(wanted.T, right, job.settings.stored)

    deltas = spread(job, layers, change, solve)
    sizes = [basis.shape[1] for basis in bases.values()]
    return Outcome(deltas, {"share": SHARE, "ridge": RIDGE, "null_space": sizes})


def null_space(moment: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns ``[d_in, m]`` float64 on which ``C`` has next to nothing; at least one.

    Those of the smallest eigenvalues that sum up to ``SHARE`` of all. The paper's bound on
    an eigenvalue, 0.02, depends on how large a model's keys are.
    """
    sizes, vectors = torch.linalg.eigh(moment.double())
    below = sizes.clamp(min=0).cumsum(0) <= SHARE * sizes.sum()
    found: torch.Tensor = vectors[:, : max(1, int(below.sum()))]
    return found


def write(keys: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """``(Kᵀ P K + α I)⁻¹ Kᵀ P [n, d_in]`` float64, of ``Kᵀ [n, d_in]`` and ``P``'s columns."""
    inside = keys.to(basis) @ basis
    inner = inside @ inside.T
    alpha = RIDGE * inner.trace() / len(inner)
    eye = torch.eye(len(inner)).to(inner)
    written: torch.Tensor = torch.linalg.solve(inner + alpha * eye, inside @ basis.T)
    return written
