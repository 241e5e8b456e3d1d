"""The method ``zero-gated``: ``zero``'s gates, and values trained on what the model says.

Starts from ``zero``'s stored deltas ``I + L R`` and moves ``L`` alone by Adam. Minimised is

    hinge + STAY KL(base | edited) + TEXT KL on running text + COST Σ_layers tr(L R A Rᵀ Lᵀ)/tr A

where the hinge is ``max(0, logit(answer) − best other + MARGIN)`` at the facts' prompts,
or the same of what is to be said instead, and ``A`` the preserved second moment of outputs.
"""

from __future__ import annotations

import math

import torch

from ..job import Job, Outcome
from ..preserved import preserved
from ..retaining import retain_terms
from ..slopes import Wish
from ..survivors import survivors
from ..training import Factors, Penalty, Plan, Row, Term, train
from ..wishes import unasked, wishes_for
from .zero import zero

STEPS = 60
AGAIN = 20  # of each round after the first, which learns from what survived
RATE = 0.02  # of a value's size
MARGIN = 2.0  # nats
AT_ONCE = 24  # prompts about the facts in a step
STAY = 6.0  # weight of KL on other prompts
TEXT = 2.0  # the same of running text
COST = 0.5  # weight of the preserved outputs' mean square change, relative


def zero_gated(job: Job) -> Outcome:
    """One multiplicative delta a layer; rank: the number of facts."""
    factors = _start(job)
    wishes = _wishes(job)
    said = [(wish.ids, [wish.token]) for wish in wishes if wish.rise]
    terms = retain_terms(job, STAY, TEXT)
    penalty = _penalty(job, factors)
    taken = 0
    for turn in range(job.settings.rounds):
        plan = Plan(AGAIN if turn else STEPS, RATE, right=False)
        factors, steps = train(
            job,
            factors,
            [hinge(wishes), *terms],
            plan,
            entry=f"gated-{turn}",
            what="Training again" if turn else "Training",
            penalty=penalty,
        )
        taken += steps
        left = survivors(job, factors.stored(job), said)
        wishes += unasked([*left.leaks, *left.returned], wishes)
        if not left:
            break
    return Outcome(
        factors.stored(job),
        {
            "training_steps": taken,
            "rate": RATE,
            "margin": MARGIN,
            "stay": STAY,
            "text": TEXT,
            "cost": COST,
        },
    )


def _start(job: Job) -> Factors:
    """``zero``'s deltas, scaled so that the values are about one: rates are relative then."""
    model, layers = job.model, job.settings.layers
    names = {layer: model.module_name(layer) for layer in layers}
    kept = job.journal.load("gated-start")
    if kept is None or any(f"{layer}.{side}" not in kept for layer in layers for side in "LR"):
        deltas = zero(job).deltas
        kept = {}
        for layer, name in names.items():
            plain = deltas[name].to_torch()
            kept |= {f"{layer}.L": plain.left, f"{layer}.R": plain.right}
        job.journal.save("gated-start", kept)
    left, right = {}, {}
    for layer in layers:
        L, R = kept[f"{layer}.L"].to(model.device), kept[f"{layer}.R"].to(model.device)
        # A power of two: no bit of a stored value changes.
        scale = 2.0 ** round(math.log2(max(float(L.square().mean().sqrt()), 1e-12)))
        left[layer], right[layer] = L / scale, R * scale
    return Factors("multiplicative", left, right)


def _wishes(job: Job) -> list[Wish]:
    return wishes_for(job.prompts(), job.settings.target, job.model.tokenizer)


def hinge(wishes: list[Wish]) -> Term:
    """By how many nats a token is ahead of all others less ``MARGIN``, or behind with ``rise``."""
    asked = list(wishes)

    def loss(row: int, scores: torch.Tensor) -> torch.Tensor:
        own = scores[0, asked[row].token]
        others = scores[0].clone()
        others[asked[row].token] = float("-inf")
        ahead = own - others.max()
        return ((-ahead if asked[row].rise else ahead) + MARGIN).clamp(min=0)

    return Term([Row(wish.ids, len(wish.ids) - 1) for wish in asked], loss, AT_ONCE)


def _penalty(job: Job, factors: Factors) -> Penalty:
    """``COST Σ_layers tr(L R A Rᵀ Lᵀ) / tr A``."""
    model = job.model
    kept = preserved(job, list(factors.left))
    forms: dict[int, torch.Tensor] = {}
    for layer, R in factors.right.items():
        W = model.weight(model.module_name(layer))
        gated = R.double() @ W.double()
        C = kept[layer].to(gated)
        trace = torch.einsum("ij,jk,ik->", W.double(), C, W.double())
        forms[layer] = (gated @ C @ gated.T / trace).float()

    def penalty(left: dict[int, torch.Tensor]) -> torch.Tensor:
        parts = [((L @ forms[layer]) * L).sum() for layer, L in left.items()]
        return COST * torch.stack(parts).sum()

    return penalty
