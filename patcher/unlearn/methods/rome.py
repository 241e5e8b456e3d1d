"""The method ``rome``: one rank-one edit a fact, one after the other, in one layer.

Meng et al. 2022, arXiv 2202.05262, equation 2: ``W' = W + Λ (C⁻¹ k)ᵀ`` with
``Λ = (v − W k) / (C⁻¹ k)ᵀ k`` makes ``W' k = v`` exactly and moves preserved outputs least.
Each edit starts from the one before: a later fact moves what an earlier one has set, which
is why MEMIT solves for all at once. The layer's keys do not depend on its own weight, so
the sequence has a closed form: with ``bᵢ = C⁻¹ kᵢ / (C⁻¹ kᵢ)ᵀ kᵢ``, the i-th column is
``aᵢ = (vᵢ − W kᵢ) − Σ_{j<i} aⱼ bⱼᵀ kᵢ``.
"""

from __future__ import annotations

import torch

from ...patch import Delta
from ..job import Job, Outcome
from ..preserved import preserved
from ..targets import values
from .memit import ridged
from .spread import fact_keys


def rome(job: Job) -> Outcome:
    """One additive delta, in the middle one of the layers; rank: the number of facts.

    The values are sought on the unedited model, all in one batch.
    """
    layers = sorted(job.settings.layers)
    layer = layers[(len(layers) - 1) // 2]
    moment = preserved(job, [layer])[layer]
    change = values(job, layer)
    left, right = in_sequence(fact_keys(job, layer), change, moment)
    delta = Delta.additive(left, right, job.settings.stored)
    return Outcome({job.model.module_name(layer): delta}, {"layers": [layer]})


def in_sequence(
    keys: torch.Tensor, change: torch.Tensor, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``A [d_out, n]`` and ``B [n, d_in]`` float64 of the edits one after the other.

    ``keys [n, d_in]``, ``change [n, d_out]``: of the outputs of the unedited weight.
    ``moment [d_in, d_in]``: ``C``.
    """
    K = keys.double().T
    X = torch.linalg.solve(ridged(moment.to(K)), K)
    B = X.T / (X * K).sum(0)[:, None]
    # A (I + strictly upper part of B K) = change: later facts see the earlier edits.
    seen = torch.eye(K.shape[1]).to(K) + (B @ K).triu(1)
    A = torch.linalg.solve_triangular(seen.T, change.to(K), upper=False).T
    return A, B
