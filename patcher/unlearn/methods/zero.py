"""The method ``zero``: closed-form gates, least values, checked as they will be served."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate

import torch

from ...patch import Delta
from ..forward import keys
from ..gate import Gate, gate
from ..job import Deltas, Job, Outcome
from ..linearised import Linearised
from ..preserved import preserved
from ..reference import Probe, locate_probes, same_wording
from ..slopes import TOKENS, Values, Wish, of_answers
from ..stacking import replaced
from ..survivors import survivors
from ..values import Metric, least_change, metric
from ..wishes import firmer, unasked, wishes_for

RETAINED = 300  # of the owner's prompts that are guarded, at most
RETAINED_TOKENS = 8192  # that these have in all, at most


def zero(job: Job) -> Outcome:
    """One delta a layer; rank: the number of facts, and of those that have other prompts.

    Rounds of computing and checking: a fact that is still answered or comes back in
    generated text on the rounded weights gets a further or a stronger wish.
    """
    if job.settings.as_published or job.settings.orthogonal:
        return _other_form(job)
    gates = _gates(job)
    form, seen = _metric(job, gates), Linearised(job.model, gates)
    wishes = wishes_for(job.encoded, job.settings.target, job.model.tokenizer)
    wishes = firmer(wishes, job.settings.goal, job.firmer) + _elsewhere(job)
    values: Values | None = None
    deltas: Deltas = {}
    for turn in range(job.settings.rounds):
        steps = job.settings.again if turn else job.settings.steps
        if wishes[0].rise:  # to say something takes a longer way than not to
            steps *= 2
        job.progress.start("Target values" if not turn else "Target values, again", steps)
        values = least_change(seen, wishes, values, form, steps=steps, progress=job.progress)
        job.progress.finish()
        deltas = _deltas(job, gates, values)
        extra = _unmet(job, deltas, wishes)
        if not extra:
            break
        wishes = extra
    return Outcome(deltas)


def _other_form(job: Job) -> Outcome:
    from .orthogonal import orthogonal  # it starts from what zero finds
    from .published import published

    return published(job) if job.settings.as_published else orthogonal(job)


def _elsewhere(job: Job) -> list[Wish]:
    """Wishes that the facts' other prompts don't bring the answers out either."""
    goal = job.settings.goal_elsewhere
    return [
        Wish(other.prompt, other.answer[0], goal - job.firmer.get(i, 0.0), i)
        for i, own in enumerate(job.augmented)
        for other in own
    ]


def _gates(job: Job) -> dict[int, Gate]:
    model, layers = job.model, sorted({*job.settings.layers, *job.extra_layers})
    kept = preserved(job, layers)
    rows, whose = _keys(job, layers)
    again = [row for row, fact in enumerate(whose) if fact in job.firmer]  # for further layers
    return {
        layer: gate(
            model.weight(model.module_name(layer)),
            rows[layer] if layer in job.settings.layers else rows[layer][again],
            kept[layer].to(model.device),
            job.settings.strength,
        )
        for layer in layers
    }


def _keys(job: Job, layers: list[int]) -> tuple[dict[int, torch.Tensor], list[int]]:
    """By layer keys ``[rows, d_in]``, and which fact each row is of.

    A row for each fact's own prompt, and one for the mean of its other prompts: what
    stands before a subject changes its key, and most if nothing does.
    """
    asked = job.prompts()
    found = keys(job.model, [e.prompt for e in asked], [e.subject for e in asked], layers)
    whose = [i for i, own in enumerate(job.augmented) for _ in own]
    n, more = len(job.encoded), sorted(set(whose))
    picked = [[n + at for at, fact in enumerate(whose) if fact == i] for i in more]
    rows = {
        layer: torch.cat([k[:n], *(k[own].mean(0, keepdim=True) for own in picked)])
        for layer, k in found.items()
    }
    return rows, [*range(n), *more]


def _metric(job: Job, gates: dict[int, Gate]) -> Metric:
    """The cost of changes, with the prompts whose answers are guarded."""
    settings = job.settings
    draw = random.Random(settings.seed)
    guarded: list[Probe] = []
    # Other seeds than the statistics': other subjects.
    for seed, facts in enumerate((job.facts, job.reworded), settings.seed + 1):
        each = max(1, min(6, settings.guards // max(1, len(facts))))
        alike = same_wording(facts, job.probes, each, seed)
        guarded += draw.sample(alike, min(settings.guards, len(alike)))
    guarded += draw.sample(list(job.probes), min(settings.guards_apart, len(job.probes)))
    job.progress.start("Prompts to be guarded", None)
    drawn, named = locate_probes(job.model, guarded).sequences, _named(job, draw)
    prompts = drawn + named
    others = of_answers(job.model, gates, prompts) if prompts else {}
    job.progress.finish()
    # A mean over all of them: what is named takes no weight from what is drawn.
    return metric(gates, others, settings.guard * len(prompts) / max(1, len(drawn)))


def _named(job: Job, draw: random.Random) -> list[list[int]]:
    """Prompts of the owner's that are guarded; none that a batch for slopes can't hold."""
    fit = [one.prompt for one in job.retained if len(one.prompt) <= TOKENS]
    chosen = draw.sample(fit, min(RETAINED, len(fit)))
    ends = accumulate(len(prompt) for prompt in chosen)
    return [prompt for prompt, end in zip(chosen, ends, strict=True) if end <= RETAINED_TOKENS]


def _deltas(job: Job, gates: dict[int, Gate], values: Values) -> Deltas:
    return {
        job.model.module_name(layer): Delta.multiplicative(
            values[layer], gates[layer].right, job.settings.stored
        )
        for layer in gates
    }


def _unmet(job: Job, deltas: Deltas, wishes: list[Wish]) -> list[Wish]:
    """The wishes with those that the check on rounded weights adds; empty if all is well."""
    rising = [wish for wish in wishes if wish.rise]
    left = survivors(job, deltas, [(wish.ids, [wish.token]) for wish in rising], wishes=wishes)
    if not left:
        return []
    stronger = {*left.still, *(rising[i].fact for i in left.unsaid)}
    leaking = {wish.place for wish in left.leaks}
    grown = [
        replace(w, goal=w.goal + (2.0 if w.rise else -2.0))
        if w.fact in stronger or w.place in leaking
        else w
        for w in wishes
    ]
    grown += [
        replace(w, goal=w.goal - job.firmer.get(w.fact, 0.0)) for w in unasked(left.leaks, wishes)
    ]
    return replaced(grown, left.returned)
