"""The method ``zero``: closed-form gates, least values, checked as they will be served."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..patch import Delta
from .forward import Edit, answered, continuations, folded, keys, next_tokens
from .job import Deltas, Job
from .reference import Probe, locate_probes, same_wording
from .slopes import Values, Wish, of_answers
from .statistics import moments
from .values import Metric, least_change, metric
from .wishes import GENERATED, leak, wishes_for
from .zero import Gate, gate

SAME_WORDING = 480  # prompts in the facts' own wordings, at most sixteen a fact


def zero(job: Job) -> Deltas:
    """One delta a layer; rank: the number of facts.

    Rounds of computing and checking: a fact that is still answered or comes back in
    generated text on the rounded weights gets a further or a stronger wish.
    """
    gates = _gates(job)
    form = _metric(job, gates)
    wishes = wishes_for(job.encoded, job.settings.target, job.model.tokenizer)
    values: Values | None = None
    deltas: Deltas = {}
    for turn in range(job.settings.rounds):
        steps = job.settings.again if turn else job.settings.steps
        if wishes[0].rise:  # to say something takes a longer way than not to
            steps *= 2
        job.progress.start("Target values" if not turn else "Target values, again", steps)
        values = least_change(
            job.model, gates, wishes, values, form, steps=steps, progress=job.progress
        )
        job.progress.finish()
        deltas = _deltas(job, gates, values)
        extra = _unmet(job, deltas, wishes)
        if not extra:
            break
        wishes = extra
    return deltas


def _gates(job: Job) -> dict[int, Gate]:
    model, layers = job.model, list(job.settings.layers)
    preserved = _preserved(job, layers)
    own = keys(model, [e.prompt for e in job.encoded], [e.subject for e in job.encoded], layers)
    return {
        layer: gate(
            model.weight(model.module_name(layer)),
            own[layer],
            preserved[layer].to(model.device),
            job.settings.strength,
        )
        for layer in layers
    }


def _metric(job: Job, gates: dict[int, Gate]) -> Metric:
    """The cost of changes, with the prompts whose answers are guarded."""
    settings = job.settings
    draw = random.Random(settings.seed)
    each = max(1, min(6, settings.guards // len(job.facts)))
    # Another seed than the statistics': other subjects.
    guarded = same_wording(job.facts, job.probes, each, settings.seed + 1)
    guarded = draw.sample(guarded, min(settings.guards, len(guarded)))
    guarded += draw.sample(list(job.probes), min(settings.guards_apart, len(job.probes)))
    job.progress.start("Prompts to be guarded", None)
    prompts = locate_probes(job.model, guarded).sequences
    others = of_answers(job.model, gates, prompts) if prompts else {}
    job.progress.finish()
    return metric(gates, others, settings.guard)


def _preserved(job: Job, layers: list[int]) -> dict[int, torch.Tensor]:
    """The second moment that is preserved, ``{layer: C}``: the mean of up to four."""

    def of_prompts(
        probes: Sequence[Probe], what: str, *, every_token: bool = False, keep: bool = False
    ) -> dict[int, torch.Tensor]:
        found = locate_probes(job.model, probes)
        return moments(
            job.model,
            found.sequences,
            None if every_token else found.positions,
            layers,
            cache=job.cache if keep else None,
            progress=job.progress,
            what=what,
        )

    parts = [
        moments(
            job.model,
            job.text,
            None,
            layers,
            cache=job.cache,
            progress=job.progress,
            what="Statistics of the reference text",
        )
    ]
    if job.probes:
        parts.append(of_prompts(job.probes, "Statistics of other subjects", keep=True))
    each = max(4, min(16, SAME_WORDING // len(job.facts)))
    alike = same_wording(job.facts, job.probes, each, job.settings.seed)
    if alike:
        parts.append(of_prompts(alike, "Statistics of the same wordings"))
        # Words that all prompts of a wording share are no place to act at.
        parts.append(of_prompts(alike, "Statistics of the same wordings", every_token=True))
    zero = torch.zeros(())
    return {layer: sum((part[layer] for part in parts), zero) / len(parts) for layer in layers}


def _deltas(job: Job, gates: dict[int, Gate], values: Values) -> Deltas:
    return {
        job.model.module_name(layer): Delta.multiplicative(
            values[layer], gates[layer].right, job.settings.stored
        )
        for layer in gates
    }


def as_edit(deltas: Deltas) -> Edit:
    """Deltas as they are stored, for the model."""
    return {name: delta.to_torch() for name, delta in deltas.items()}


def _unmet(job: Job, deltas: Deltas, wishes: list[Wish]) -> list[Wish]:
    """The wishes with those that the check on rounded weights adds; empty if all is well."""
    with folded(job.model, as_edit(deltas)):
        still = answered(job.model, [(e.prompt, e.answer) for e in job.encoded])
        texts = continuations(job.model, [e.prompt for e in job.encoded], GENERATED)
        rising = [w for w in wishes if w.rise]
        unsaid = [
            w.fact
            for w, token in zip(
                rising, next_tokens(job.model, [w.ids for w in rising]), strict=True
            )
            if token != w.token
        ]
    stronger = {i for i, said in enumerate(still) if said} | set(unsaid)
    grown = [
        replace(w, goal=w.goal + (2.0 if w.rise else -2.0)) if w.fact in stronger else w
        for w in wishes
    ]
    known = {(tuple(w.ids), w.token) for w in wishes}
    for i, (fact, encoded) in enumerate(zip(job.facts, job.encoded, strict=True)):
        wish = leak(job.model.tokenizer, encoded, i, fact.target, texts[i])
        if wish and (tuple(wish.ids), wish.token) not in known:
            grown.append(wish)
    return grown if stronger or len(grown) > len(wishes) else []
