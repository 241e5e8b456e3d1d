"""``zero --as-published``: ZeroUnlearn as its authors' code computes it, to compare with.

Lin et al. 2026, arXiv 2605.18879; written anew from the formulas. Per layer, lowest first,
with keys ``K``, outputs ``U = W K``, wanted changes ``E``, the reference text's moment
``C = E[k kᵀ]`` and mean key ``μ``:

    D = P Y Wᵀ B⁻¹
    Y = λ_w W (C − μ μᵀ) + λ_f (U + E) Kᵀ + λ W
    B = W (λ_w C + λ_f K Kᵀ + λ I) Wᵀ
    P = (1 + ε) I − v vᵀ

where ``v`` spans the values that make the model give the facts' *true* answers. The text's
``V Kᵀ`` is centred and its ``K Kᵀ`` is not, which differ by one rank, so

    D = P (I + λ_f E Uᵀ B⁻¹ − λ_w (W μ) (W μ)ᵀ B⁻¹)

of which all but ``ε I`` has rank ``2n + 1``. That part, a hundredth of every output, has full
rank: no low-rank patch can hold it, and it is left out.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...patch import Delta
from ..forward import batches, inputs_of
from ..gate import Strength
from ..job import Job, Outcome
from ..statistics import moments
from ..targets import values
from .spread import spread

EPSILON = 0.01


def published(job: Job) -> Outcome:
    """One multiplicative delta a layer; rank: twice the number of facts, and one.

    Its target is the end of text where the job's is ``suppress``: the paper has no such.
    """
    if job.settings.target == "suppress":
        job = replace(job, settings=replace(job.settings, target="eos"))
    model, layers = job.model, sorted(job.settings.layers)
    kept = moments(
        model,
        job.text,
        None,
        layers,
        cache=job.cache,
        progress=job.progress,
        what="Statistics of the reference text",
    )
    means = mean_keys(job, layers)
    answers = [encoded.answer for encoded in job.encoded]

    def solve(layer: int, keys: torch.Tensor, wanted: torch.Tensor) -> Delta:
        W = model.weight(model.module_name(layer))
        true = keys @ W.T + values(job, layer, said=answers)
        left, right = factors(
            W, keys, wanted, true, kept[layer], means[layer], job.settings.strength
        )
        return Delta.multiplicative(left, right, job.settings.stored)

    deltas = spread(job, layers, values(job, layers[-1]), solve)
    target = {"target": "eos"} if job.settings.target == "eos" else {}
    return Outcome(deltas, target)


@torch.no_grad()
def mean_keys(job: Job, layers: list[int]) -> dict[int, torch.Tensor]:
    """The mean key of the reference text, ``{layer: [d_in]}`` float32."""
    lengths = [len(window) for window in job.text]
    total: dict[int, torch.Tensor] = {}
    for group in batches(lengths):
        for layer, found in inputs_of(job.model, [job.text[i] for i in group], layers).items():
            own = torch.stack([found[r, : lengths[i]].sum(0) for r, i in enumerate(group)]).sum(0)
            total[layer] = total[layer] + own if layer in total else own
    return {layer: value / sum(lengths) for layer, value in total.items()}


def factors(
    weight: torch.Tensor,
    keys: torch.Tensor,
    wanted: torch.Tensor,
    true: torch.Tensor,
    moment: torch.Tensor,
    mean: torch.Tensor,
    strength: Strength,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``L [d_out, r]``, ``R [r, d_out]`` float64 with ``D = I + L R``, ``ε I`` left out.

    Args:
        weight: ``W [d_out, d_in]``.
        keys: ``Kᵀ [n, d_in]``.
        wanted: ``Eᵀ [n, d_out]``.
        true: ``[n, d_out]``, what ``v`` spans.
        moment: ``C [d_in, d_in]``.
        mean: ``μ [d_in]``.
        strength: λ_w, λ_f and λ.
    """
    W = weight.double()
    K, E, C, mu = keys.T.to(W), wanted.T.to(W), moment.to(W), mean.to(W)
    U, centre = W @ K, (W @ mu)[:, None]
    eye = torch.eye(len(C)).to(W)
    B = W @ (strength.preserve * C + strength.forget * K @ K.T + strength.ridge * eye) @ W.T
    right = torch.linalg.solve(B, torch.cat([strength.forget * U, centre], 1)).T
    left = torch.cat([E, -strength.preserve * centre], 1)
    directions, sizes, _ = torch.linalg.svd(true.T.to(W), full_matrices=False)
    v = directions[:, sizes > 1e-6 * sizes[0]]
    left = (1 + EPSILON) * left - v @ (v.T @ left)
    return torch.cat([left, -v], 1), torch.cat([right, v.T])
