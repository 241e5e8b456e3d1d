"""What a linear read-out of the later layers still knows: the logit lens.

nostalgebraist 2020, "interpreting GPT: the logit lens": a layer's output goes through
the model's final norm and head, as if no layer came after it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from ...unlearn.forward import batches, hidden, logits, pad
from ...unlearn.models import Model
from ..asking import finite
from ..intervals import of_facts
from .setting import CanNotAskError, Probe, Setting, both_sides

NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "final_norm")
NEAR = 10
LARGEST = 1e-3  # of the read-out of the last layer against the model itself, relative

Ranks = list[list[int]]  # of each fact, the rank of the answer's first token at each layer


def _ready(setting: Setting) -> None:
    """The last layer's read-out must be what the model itself says."""
    model = setting.model
    read = reader(model)
    prompt = setting.facts[0].encoded.prompt
    with torch.no_grad():
        states, last = _states(model, [prompt])
        own = logits(model, last[0, -1:])
        found = logits(model, read(states[-1][0, -1:]))
    if not torch.allclose(own, found, rtol=LARGEST, atol=LARGEST * float(own.abs().max())):
        raise CanNotAskError("the last layer's read-out is not what the model says")


def reader(model: Model) -> Callable[[torch.Tensor], torch.Tensor]:
    """From a layer's output ``[..., d]`` to what the head takes: final norm, and projection.

    Raises:
        CanNotAskError: no final norm is found.
    """
    base = model.network.base_model
    stem = getattr(base, "decoder", base)
    norm = next((found for name in NORMS if (found := getattr(stem, name, None))), None)
    if norm is None:
        raise CanNotAskError(f"{model.class_name} has no final norm that is known here")
    project = getattr(stem, "project_out", None)
    return lambda states: project(norm(states)) if project else norm(states)


@torch.no_grad()
def _look(setting: Setting) -> Ranks:
    model, read = setting.model, reader(setting.model)
    prompts = [asked.encoded.prompt for asked in setting.facts]
    ranks: Ranks = [[] for _ in prompts]
    for group in batches([len(prompt) for prompt in prompts]):
        states, _ = _states(model, [prompts[i] for i in group])
        rows = torch.arange(len(group))
        ends = torch.tensor([len(prompts[i]) - 1 for i in group])
        tokens = torch.tensor([setting.facts[i].encoded.answer[0] for i in group])
        for layer in states:
            scores = finite(logits(model, read(layer[rows, ends])))
            own = scores.gather(1, tokens.to(scores.device)[:, None])
            for i, above in zip(group, (scores > own).sum(-1).tolist(), strict=True):
                ranks[i].append(above + 1)
    return ranks


def _states(model: Model, sequences: list[list[int]]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """All layers' outputs ``[batch, length, d]``, and the model's own last hidden states."""
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for layer in model.network.get_submodule(model.architecture.layers):
            hooks.callback(layer.register_forward_hook(keep).remove)
        last = hidden(model, pad(sequences, model.device))
    return seen, last


def _summary(setting: Setting, ranks: Ranks) -> dict[str, Any]:
    """Shares over the layers from the first edited one on (over all without an edit).

    ``layers``: the share in the top ten at each layer of all.
    """
    first = min(setting.edited, default=0)
    best = [min(row[first:]) for row in ranks]
    layers = range(len(ranks[0]))
    return {
        "from_layer": first,
        "top_1": of_facts([rank == 1 for rank in best], setting.seed).as_dict(),
        "top_10": of_facts([rank <= NEAR for rank in best], setting.seed).as_dict(),
        "layers": [
            of_facts([row[layer] <= NEAR for row in ranks], setting.seed).as_dict()
            for layer in layers
        ],
    }


LENS = Probe(_ready, _look, both_sides(_summary))
