"""One change of what a layer puts out, spread over several layers, as MEMIT does it.

From the lowest layer up, each takes an equal share of what is still missing in the state
that leaves the highest (Meng et al. 2023, arXiv 2210.07229, section 4.3). Keys and what is
missing are read anew on the weights as edited so far, rounded as they will be served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...patch import Delta
from ..forward import as_edit, folded, keys
from ..job import Deltas, Job
from ..prompts import Encoded
from ..targets import passed_on
from ..upward import leaving

# layer, keys [n, d_in], wanted changes of the outputs [n, d_out] -> the edit of that layer
Solve = Callable[[int, torch.Tensor, torch.Tensor], Delta]


def fact_keys(job: Job, layer: int) -> torch.Tensor:
    """The facts' keys ``[n, d_in]``: of a fact's prompts, the augmented ones too, the mean."""
    model = job.model
    more = job.augmented or [()] * len(job.encoded)
    prompts: list[list[Encoded]] = [[e, *m] for e, m in zip(job.encoded, more, strict=True)]
    flat = [prompt for own in prompts for prompt in own]
    found = keys(model, [p.prompt for p in flat], [p.subject for p in flat], [layer])[layer]
    parts = torch.split(found, [len(own) for own in prompts])
    return torch.stack([part.mean(0) for part in parts])


def spread(job: Job, layers: Sequence[int], change: torch.Tensor, solve: Solve) -> Deltas:
    """The edits of all layers, the lowest first.

    Args:
        job: facts and model; the model's weights are put back at the end.
        layers: ascending.
        change: ``[n, d_out]``, of the output of the last layer's down projection.
        solve: one layer's edit; called with the edits below in force.
    """
    model, last = job.model, layers[-1]
    prompts, places = [e.prompt for e in job.encoded], [e.subject for e in job.encoded]
    before = leaving(model, prompts, places, last)
    goal = leaving(model, prompts, places, last, change)
    deltas: Deltas = {}
    for i, layer in enumerate(layers):
        with folded(model, as_edit(deltas)):
            left = goal - leaving(model, prompts, places, last)
            wanted = _at_output(change, goal - before, left) / (len(layers) - i)
            delta = solve(layer, fact_keys(job, layer), wanted)
        deltas[model.module_name(layer)] = delta
    return deltas


def _at_output(change: torch.Tensor, moved: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """What is left ``[n, d]`` of a move of the state, as a change of a layer's output.

    ``moved`` is what ``change`` does to the state. Where a layer normalises its output
    before it adds it, that part of ``change`` which makes the like part of the move.
    """
    factor = passed_on(change, moved)
    if factor:
        return left / factor
    share = (left * moved).sum(1) / (moved * moved).sum(1).clamp_min(1e-30)
    return change * share[:, None]
