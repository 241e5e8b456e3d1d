"""How what a model says moves with an edit's values: one backward pass for many prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from .forward import batches, hidden, logits, pad
from .gate import Gate
from .models import Model

Values = dict[int, torch.Tensor]  # layer -> E [d_out, n] float32
Score = Callable[[list[int], torch.Tensor], torch.Tensor]  # which, logits [b, v] -> [b]
TOKENS = 512  # padded tokens in a batch that is differentiated


@dataclass(frozen=True)
class Wish:
    """At the end of ``ids`` the log-odds of ``token`` are to be at most ``goal``.

    With ``rise`` they are to be at least ``goal`` instead. ``fact``: whose wish it is.
    """

    ids: list[int]
    token: int
    goal: float
    fact: int
    rise: bool = False

    @property
    def place(self) -> tuple[tuple[int, ...], int]:
        """What it is about, however far: ids and token."""
        return tuple(self.ids), self.token


class Slopes(NamedTuple):
    """Of one layer: prompt ``row[t]`` has the slope ``Σ_t outputs[t]ᵀ gates[t]`` in ``E``.

    Sorted by nothing in particular; ``row`` is on the CPU, the others where the model is.
    """

    outputs: torch.Tensor  # [tokens, d_out]
    gates: torch.Tensor  # [tokens, n]
    row: torch.Tensor  # [tokens]


def of_wishes(
    model: Model, gates: dict[int, Gate], wishes: Sequence[Wish], values: Values
) -> tuple[torch.Tensor, dict[int, Slopes]]:
    """By how many nats each wish is missed ``[wishes]`` (negative: met), and its slopes."""

    def score(group: list[int], scores: torch.Tensor) -> torch.Tensor:
        return _excess(scores, [wishes[i] for i in group])

    return linearise(model, gates, [wish.ids for wish in wishes], values, score)


def of_answers(
    model: Model, gates: dict[int, Gate], prompts: Sequence[list[int]]
) -> dict[int, Slopes]:
    """Of the log-probability of what the unpatched model says to each prompt."""
    nothing = {layer: _zeros(model, gate) for layer, gate in gates.items()}

    def score(group: list[int], scores: torch.Tensor) -> torch.Tensor:
        return scores.log_softmax(-1).max(-1).values

    return linearise(model, gates, prompts, nothing, score)[1]


def _zeros(model: Model, gate: Gate) -> torch.Tensor:
    return torch.zeros(gate.right.shape[1], gate.right.shape[0], device=model.device)


def start(model: Model, gates: dict[int, Gate]) -> Values:
    """The values of an edit that does nothing."""
    return {layer: _zeros(model, gate) for layer, gate in gates.items()}


def linearise(
    model: Model,
    gates: dict[int, Gate],
    prompts: Sequence[list[int]],
    values: Values,
    score: Score,
) -> tuple[torch.Tensor, dict[int, Slopes]]:
    """Scores ``[prompts]`` float64 of the logits at each prompt's end, and their slopes."""
    result = torch.zeros(len(prompts), dtype=torch.float64)
    parts: dict[int, list[Slopes]] = {layer: [] for layer in gates}
    for group in batches([len(ids) for ids in prompts], TOKENS):
        chosen = [prompts[i] for i in group]
        found, slopes = _batch(model, gates, chosen, values, partial(score, group))
        result[group] = found.double().cpu()
        at = torch.tensor([(r, c) for r, ids in enumerate(chosen) for c in range(len(ids))])
        rows, columns = at[:, 0], at[:, 1]
        for layer, (outputs, gated) in slopes.items():
            own = torch.tensor(group)[rows]
            parts[layer].append(Slopes(outputs[rows, columns], gated[rows, columns], own))
    return result, {layer: joined(found_) for layer, found_ in parts.items()}


def joined(parts: Sequence[Slopes]) -> Slopes:
    """Slopes laid one after the other."""
    return Slopes(
        torch.cat([part.outputs for part in parts]),
        torch.cat([part.gates for part in parts]),
        torch.cat([part.row for part in parts]),
    )


def _batch(
    model: Model,
    gates: dict[int, Gate],
    prompts: Sequence[list[int]],
    values: Values,
    score: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Scores ``[b]``; by layer slopes ``[b, length, d_out]``, gates ``[b, length, n]``."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with ExitStack() as hooks, torch.enable_grad():
        for layer, gate in gates.items():
            hook = _editing(model.module(layer), layer, gate, values[layer], seen)
            hooks.callback(model.module(layer).register_forward_hook(hook).remove)
        states = hidden(model, pad(prompts, model.device))
        last = [len(ids) - 1 for ids in prompts]
        found = score(logits(model, states[list(range(len(prompts))), last]))
        slopes = torch.autograd.grad(found.sum(), [new for new, _ in seen.values()])
    shape = (len(prompts), -1)
    return found.detach(), {
        layer: (slope.reshape(*shape, slope.shape[-1]), gated.reshape(*shape, gated.shape[-1]))
        for slope, (layer, (_, gated)) in zip(slopes, seen.items(), strict=True)
    }


def _editing(
    module: torch.nn.Module,
    layer: int,
    gate: Gate,
    value: torch.Tensor,
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]],
) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
    """A hook that does to the output what the edit does to the weight, and keeps it."""
    bias = getattr(module, "bias", None)

    def edit(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        # The edit acts on the weight: a bias is no part of what the gate reads.
        gated = (out if bias is None else out - bias) @ gate.right.T
        new = out + gated @ value.T
        new = new if new.requires_grad else new.requires_grad_()
        seen[layer] = (new, gated.detach())
        return new

    return edit


def _excess(scores: torch.Tensor, wishes: Sequence[Wish]) -> torch.Tensor:
    """``[wishes]`` nats by which the log-odds miss their goals, of logits ``[wishes, v]``."""
    token = torch.tensor([wish.token for wish in wishes], device=scores.device)[:, None]
    goal = torch.tensor([wish.goal for wish in wishes], device=scores.device)
    sign = torch.tensor([-1.0 if wish.rise else 1.0 for wish in wishes], device=scores.device)
    rest = scores.scatter(1, token, float("-inf")).logsumexp(1)
    return sign * (scores.gather(1, token)[:, 0] - rest - goal)
