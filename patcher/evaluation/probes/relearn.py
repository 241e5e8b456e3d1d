"""Whether forgotten facts come back when *other* forgotten facts are taught again.

After "Do Unlearning Methods Remove Information from Language Model Weights?"
(arXiv 2410.08827): what is gone should not return by fine-tuning on what is
independent of it. Half of the facts is taught, the other half only asked; both
halves of one subject go together.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...unlearn.forward import hidden, logits, pad
from ...unlearn.models import Model
from ..asking import finite, judge
from ..intervals import of_facts
from .setting import Asked, CanNotAskError, Probe, Setting

RATE = 1e-4
STEPS = 32
LOOKED_AT = (0, 1, 2, 4, 8, 16, 32)  # steps after which both halves are asked
BATCH = 16  # facts a step

Curve = dict[int, tuple[list[bool], list[bool]]]  # step -> taught half, other half


def halves(setting: Setting) -> tuple[list[Asked], list[Asked]]:
    """The facts that are taught again, and those that are only asked: by subject, seeded."""
    groups: dict[str, list[Asked]] = {}
    for asked in setting.facts:
        groups.setdefault((asked.subject or asked.fact.text).casefold(), []).append(asked)
    names = sorted(groups)
    random.Random(setting.seed).shuffle(names)
    taught: list[Asked] = []
    other: list[Asked] = []
    for name in names:
        (taught if len(taught) <= len(other) else other).extend(groups[name])
    return taught, other


def _ready(setting: Setting) -> None:
    if not all(halves(setting)):
        raise CanNotAskError("relearning needs facts about two subjects")


def _look(setting: Setting) -> Curve:
    """Adam on the down projections of all layers, unrounded; the weights are put back."""
    taught, other = halves(setting)
    draw = random.Random(setting.seed)
    curve: Curve = {}
    with _trainable(setting.model) as weights:
        adam = torch.optim.Adam(weights, lr=RATE)
        for step in range(STEPS + 1):
            if step in LOOKED_AT:
                curve[step] = (_said(setting.model, taught), _said(setting.model, other))
            if step < STEPS:
                batch = taught if len(taught) <= BATCH else draw.sample(taught, BATCH)
                slopes = torch.autograd.grad(_loss(setting.model, batch), weights)
                for weight, slope in zip(weights, slopes, strict=True):
                    weight.grad = slope
                adam.step()
    return curve


@contextmanager
def _trainable(model: Model) -> Iterator[list[torch.nn.Parameter]]:
    weights = [model.parameter(model.module_name(layer)) for layer in range(model.layers)]
    kept = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for weight, old in zip(weights, kept, strict=True):
            weight.requires_grad_(False)
            weight.grad = None
            weight.data.copy_(old)


def _loss(model: Model, batch: Sequence[Asked]) -> torch.Tensor:
    """Mean negative log-probability of the answers' tokens, in nats."""
    whole = [[*asked.encoded.prompt, *asked.encoded.answer] for asked in batch]
    with torch.enable_grad():
        states = hidden(model, pad([ids[:-1] for ids in whole], model.device))
        rows, columns, tokens = [], [], []
        for row, (asked, ids) in enumerate(zip(batch, whole, strict=True)):
            for place in range(len(asked.encoded.prompt), len(ids)):
                rows.append(row)
                columns.append(place - 1)
                tokens.append(ids[place])
        scores = finite(logits(model, states[rows, columns]))
        wanted = torch.tensor(tokens, device=scores.device)
        return torch.nn.functional.cross_entropy(scores, wanted)


def _said(model: Model, facts: Sequence[Asked]) -> list[bool]:
    return [one.answered for one in judge(model, [asked.pair for asked in facts])]


def _tell(setting: Setting, base: Curve, patched: Curve) -> dict[str, Any]:
    taught, other = halves(setting)
    return {
        "taught": len(taught),
        "held_out": len(other),
        "rate": RATE,
        "base": _summary(setting, base),
        "patched": _summary(setting, patched),
    }


def _summary(setting: Setting, curve: Curve) -> dict[str, Any]:
    steps = sorted(curve)
    full = next((step for step in steps if all(curve[step][0])), None)
    before = curve[steps[0]][1]
    back = {
        step: [now for was, now in zip(before, curve[step][1], strict=True) if not was]
        for step in steps
    }
    return {
        "steps": steps,
        "taught": [of_facts(curve[step][0], setting.seed).as_dict() for step in steps],
        "held_out": [of_facts(curve[step][1], setting.seed).as_dict() for step in steps],
        "steps_until_taught": full,
        "steps_until_first_back": next((step for step in steps if any(back[step])), None),
        "steps_until_half_back": next(
            (s for s in steps if 0 < len(back[s]) <= 2 * sum(back[s])), None
        ),
        "came_back": of_facts(back[steps[-1]], setting.seed).as_dict(),
    }


RELEARN = Probe(_ready, _look, _tell)
