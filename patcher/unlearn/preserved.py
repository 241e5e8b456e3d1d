"""What an edit must leave as it is: the second moment of the keys that are preserved."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .job import Job
from .reference import Probe, locate_probes, same_wording
from .stacking import forgotten_moments
from .statistics import moments

SAME_WORDING = 480  # prompts in the facts' own wordings, at most sixteen a fact


def preserved(job: Job, layers: list[int]) -> dict[int, torch.Tensor]:
    """The second moment that is preserved, ``{layer: C}``: the mean of up to four.

    On top of a stack, with what that acts on as a further one of equal weight.
    """

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
    mean = {layer: sum((part[layer] for part in parts), zero) / len(parts) for layer in layers}
    for layer, beneath in forgotten_moments(job, mean).items():
        mean[layer] = (mean[layer] * len(parts) + beneath) / (len(parts) + 1)
    return mean
