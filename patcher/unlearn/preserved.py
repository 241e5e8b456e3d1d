"""What an edit must leave as it is: the second moment of the keys that are preserved."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .job import Job
from .reference import Probe, locate_probes, same_wording
from .stability import steadied
from .stacking import forgotten_moments
from .statistics import moments, several_moments

SAME_WORDING = 480  # prompts in the facts' own wordings, at most sixteen a fact


def preserved(job: Job, layers: list[int]) -> dict[int, torch.Tensor]:
    """The second moment that is preserved, ``{layer: C}``: the mean of up to four.

    They are weighed by the settings' mixture; those that the facts give no prompts for
    are left out. On top of a stack, with what that acts on as a further one of equal weight.
    """
    weights = job.settings.mixture
    parts: list[tuple[float, dict[int, torch.Tensor]]] = []
    if weights[0]:
        what = "Statistics of the reference text"
        parts.append((weights[0], _kept(job, job.text, None, layers, what)))
    if job.probes and weights[1]:
        others = locate_probes(job.model, job.probes)
        what = "Statistics of other subjects"
        parts.append((weights[1], _kept(job, *others, layers, what)))
    if any(weights[2:]) and (alike := _alike(job)):
        found = locate_probes(job.model, alike)
        what = "Statistics of the same wordings"
        # Words that all prompts of a wording share are no place to act at: every token's, too.
        chosen = [(w, at) for w, at in zip(weights[2:], (found.positions, None), strict=True) if w]
        at = [positions for _, positions in chosen]
        each = several_moments(job.model, found.sequences, at, layers, job.progress, what)
        parts += [(w, part) for (w, _), part in zip(chosen, each, strict=True)]
    zero, whole = torch.zeros(()), sum(weight for weight, _ in parts)
    mean = {layer: sum((w * part[layer] for w, part in parts), zero) / whole for layer in layers}
    for layer, beneath in forgotten_moments(job, mean).items():
        mean[layer] = (mean[layer] * len(parts) + beneath) / (len(parts) + 1)
    job.progress.start("Condition of what is preserved", len(mean))
    for layer, moment in mean.items():
        mean[layer], job.conditions[layer] = steadied(job.model, layer, moment)
        numbers = ", ".join(f"{value:.1e}" for value in job.conditions.values())
        job.progress.step(len(job.conditions), numbers)
    job.progress.finish()
    return mean


def _kept(
    job: Job,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[int] | None,
    layers: list[int],
    what: str,
) -> dict[int, torch.Tensor]:
    return moments(
        job.model, sequences, positions, layers, cache=job.cache, progress=job.progress, what=what
    )


def _alike(job: Job) -> list[Probe]:
    """Prompts in the facts' wordings, and in those of their other prompts."""
    each = max(4, min(16, SAME_WORDING // len(job.facts)))
    own = same_wording(job.facts, job.probes, each, job.settings.seed)
    fewer = max(1, min(8, SAME_WORDING // max(1, len(job.reworded))))
    return own + same_wording(job.reworded, job.probes, fewer, job.settings.seed + 5)
