"""Where the facts sit: layers chosen by what forgetting there would move besides.

What :mod:`patcher.unlearn.values` does first, for every layer at once and on a few of
the facts: one pass for what the layers put out, one forward and back for the facts and
one for prompts about other subjects. From these follow, for every window of layers and
to first order, the least edit that makes the model stop answering, and by how many nats
it moves the log-probability of what the model says to the others. docs/methods.md, "Layers".
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from .forward import batches, hidden, pad
from .gate import Gate, gate_of
from .job import Job
from .layers import by_depth
from .models import Model
from .prompts import Encoded
from .reference import Probe, locate_probes, same_wording
from .slopes import of_answers, of_wishes, start
from .values import nonnegative, products
from .wishes import wishes_for

FACTS = 16  # facts that are looked at
TEXT = 2  # tokens of running text, as a multiple of a layer's outputs
SUBJECTS = 96  # prompts about other subjects
ALIKE = 64  # prompts in the facts' wordings
JUDGED = 64  # prompts that the choice is judged by; half of them in the facts' wordings
WIDEST = 6  # layers in a window, at most: a file grows with each
NEAR = 1.1  # times the least that the chosen window may move, for the sake of fewer layers

Window = tuple[int, ...]


@dataclass(frozen=True)
class Evidence:
    """Inner products of slopes under the inverse cost, by layer, float64.

    ``excess`` ``[n]``: nats that the facts' log-odds are to fall. ``facts`` ``[n, n]``:
    of the facts; ``others`` ``[n, N]``: of facts and the ``N`` prompts that are judged.
    """

    excess: torch.Tensor
    facts: list[torch.Tensor]
    others: list[torch.Tensor]


@dataclass(frozen=True)
class Choice:
    """Chosen layers. ``by``: ``evidence``, or ``depth`` where there is none.

    ``moved``: of every window that was looked at, as :func:`moved`.
    """

    layers: Window
    by: str
    moved: Mapping[Window, float]


def with_chosen_layers(job: Job, known: Sequence[bool]) -> Job:
    """The job with layers by evidence, or by depth where the model knows none of the facts."""
    choice = choose_by_evidence(job, known)
    settings = replace(job.settings, layers=choice.layers, layers_by=choice.by)
    return replace(job, settings=settings)


def choose_by_evidence(job: Job, known: Sequence[bool]) -> Choice:
    """The window of layers in which forgetting moves other answers least.

    Of windows that move them nearly as little, one with the fewest layers; of these the
    least, and of equals the first. The same job gives the same choice.

    Args:
        job: its settings' layers are not looked at.
        known: of each of the job's facts, whether the model answers it.
    """
    depth = job.model.layers
    encoded = [fact for fact, yes in zip(job.encoded, known, strict=True) if yes]
    step = max(1, -(-len(encoded) // FACTS))
    if not encoded or not job.probes:
        return Choice(tuple(by_depth(depth)), "depth", {})
    evidence = gather(job, encoded[::step])
    windows = [
        tuple(range(first, first + wide))
        for wide in range(1, min(WIDEST, depth) + 1)
        for first in range(depth - wide + 1)
    ]
    found = {window: moved(evidence, window) for window in windows}
    least = min(found.values())
    if not least < float("inf"):
        return Choice(tuple(by_depth(depth)), "depth", found)
    near = [window for window in windows if found[window] <= NEAR * least]
    fewest = min(map(len, near))
    best = min((w for w in near if len(w) == fewest), key=lambda window: found[window])
    return Choice(best, "evidence", found)


def moved(evidence: Evidence, layers: Sequence[int]) -> float:
    """Nats, on average, by which forgetting in these layers moves what is judged.

    inf where it can't be done there, or not be told.
    """
    h = torch.stack([evidence.facts[layer] for layer in layers]).sum(0)
    others = torch.stack([evidence.others[layer] for layer in layers]).sum(0)
    wanted = evidence.excess.clamp(min=0)
    if bool(((h.diagonal() <= 0) & (wanted > 0)).any()):
        return float("inf")
    result = float((nonnegative(h, wanted) @ others).abs().mean())
    return result if result == result else float("inf")


def gather(job: Job, encoded: Sequence[Encoded]) -> Evidence:
    """What forgetting these facts would take in each layer, and what it would move."""
    model, layers = job.model, range(job.model.layers)
    job.progress.start("Where the facts sit", 3)
    gates = _gates(job, encoded)
    job.progress.step(1)
    wishes = wishes_for(encoded, "suppress", model.tokenizer)
    excess, own = of_wishes(model, gates, wishes, start(model, gates))
    job.progress.step(2)
    prompts = locate_probes(model, _judged(job)).sequences
    rest = of_answers(model, gates, prompts)
    job.progress.finish()
    n, count = len(wishes), len(prompts)
    inverse = {layer: torch.linalg.inv(gates[layer].cost).float() for layer in layers}
    return Evidence(
        excess,
        [products(own[i], own[i], inverse[i], n, n) for i in layers],
        [products(own[i], rest[i], inverse[i], n, count) for i in layers],
    )


def _gates(job: Job, encoded: Sequence[Encoded]) -> dict[int, Gate]:
    """A gate of every layer, from few samples of what is preserved."""
    model = job.model
    draw = random.Random(job.settings.seed)
    subjects = locate_probes(model, draw.sample(list(job.probes), min(SUBJECTS, len(job.probes))))
    each = -(-ALIKE // len(job.facts))
    alike = same_wording(job.facts, job.probes, each, job.settings.seed)
    words = locate_probes(model, draw.sample(alike, min(ALIKE, len(alike))))
    wide = model.weight(model.module_name(0)).shape[0]
    mean = torch.zeros(model.layers, wide, wide, device=model.device)  # E[o oᵀ], o = W k
    parts = _add(mean, model, job.text[: 1 + TEXT * wide // job.settings.window])
    parts += _add(mean, model, *subjects)
    parts += _add(mean, model, *words) + _add(mean, model, words.sequences) if alike else 0
    own = _at(model, [fact.prompt for fact in encoded], [fact.subject for fact in encoded])
    strength = job.settings.strength
    return {
        layer: gate_of(mean[layer].double() / parts, own[layer].T.double(), strength)
        for layer in range(model.layers)
    }


def _add(
    mean: torch.Tensor,
    model: Model,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[int] | None = None,
) -> int:
    """Add ``E[o oᵀ]`` at one position a sequence, or at all tokens; how many were added."""
    count = len(sequences) if positions else sum(map(len, sequences))
    for group, outputs in _outputs(model, sequences):
        if positions:
            rows, columns = list(range(len(group))), [positions[i] for i in group]
        else:
            rows = [row for row, i in enumerate(group) for _ in sequences[i]]
            columns = [column for i in group for column in range(len(sequences[i]))]
        for layer, out in enumerate(outputs):
            o = out[rows, columns]
            mean[layer] += o.T @ o / count
    return 1 if count else 0


def _at(
    model: Model, sequences: Sequence[Sequence[int]], positions: Sequence[int]
) -> list[torch.Tensor]:
    """What each layer's weight puts out at one position a sequence, ``[n, d_out]``."""
    found: dict[int, list[torch.Tensor]] = {}
    for group, outputs in _outputs(model, sequences):
        for row, i in enumerate(group):
            found[i] = [out[row, positions[i]] for out in outputs]
    return [torch.stack([found[i][k] for i in sorted(found)]) for k in range(model.layers)]


@torch.no_grad()
def _outputs(
    model: Model, sequences: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """By batch its indices and, of every layer, ``W k`` at every token ``[b, length, d_out]``."""
    seen: list[torch.Tensor] = [torch.empty(0)] * model.layers
    with ExitStack() as hooks:
        for layer in range(model.layers):

            def look(module: Any, _: Any, out: torch.Tensor, layer: int = layer) -> None:
                bias = getattr(module, "bias", None)
                seen[layer] = out if bias is None else out - bias

            hooks.callback(model.module(layer).register_forward_hook(look).remove)
        for group in batches([len(sequence) for sequence in sequences]):
            hidden(model, pad([sequences[i] for i in group], model.device))
            yield group, [out.reshape(len(group), -1, out.shape[-1]) for out in seen]


def _judged(job: Job) -> list[Probe]:
    draw = random.Random(job.settings.seed + 2)  # others than the statistics' and the guards'
    each = -(-JUDGED // len(job.facts))
    alike = same_wording(job.facts, job.probes, each, job.settings.seed + 2)
    chosen = draw.sample(alike, min(JUDGED // 2, len(alike)))
    return chosen + draw.sample(list(job.probes), min(JUDGED - len(chosen), len(job.probes)))
