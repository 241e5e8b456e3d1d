"""Running a model: batches, captured keys, edits in place of weights, greedy answers.

Sequences are padded on the right and run without a mask: attention is causal, so
what is read at a sequence's own positions never sees the padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from ..kernels import LowRank, fold
from ..patch import Delta
from .models import Model, quiet

Edit = Mapping[str, LowRank]  # module name -> delta, float32
TOKENS = 1024  # padded tokens in one batch: enough to keep two cores busy, small enough for memory


class _EnoughError(Exception):
    """Raised inside a forward pass once all that is asked for has been seen."""


def batches(lengths: Sequence[int], tokens: int = TOKENS) -> Iterator[list[int]]:
    """Indices in groups of like length, each at most ``tokens`` padded tokens (at least one)."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if group and (len(group) + 1) * lengths[index] > tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Ids ``[batch, longest]`` int64, zeros to the right."""
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return ids.to(device)


def hidden(model: Model, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """The last hidden states ``[batch, length, d]`` of ids ``[batch, length]``.

    ``more``: what else the network's forward takes.
    """
    states: torch.Tensor = model.network.base_model(
        input_ids=ids, **{"use_cache": False, **more}
    ).last_hidden_state
    return states


def logits(model: Model, states: torch.Tensor) -> torch.Tensor:
    """Logits ``[n, vocabulary]`` of last hidden states ``[n, d]``, as the model's own head."""
    config = model.network.config
    result: torch.Tensor = model.network.get_output_embeddings()(states)
    if getattr(config, "logit_scale", None):
        result = result * config.logit_scale
    if getattr(config, "logits_scaling", None):
        result = result / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(result / cap) * cap if cap else result


@torch.no_grad()
def keys(
    model: Model,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[int],
    layers: Sequence[int],
) -> dict[int, torch.Tensor]:
    """Inputs of the down projections, ``{layer: [n, d_in]}``, at one position a sequence."""
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    order: list[int] = []
    for group in batches([len(s) for s in sequences]):
        order += group
        at = torch.tensor([positions[i] for i in group])
        for layer, inputs in inputs_of(model, [sequences[i] for i in group], layers).items():
            found[layer].append(inputs[torch.arange(len(group)), at])
    back = torch.tensor(order).argsort()
    return {layer: torch.cat(parts)[back.to(parts[0].device)] for layer, parts in found.items()}


@torch.no_grad()
def inputs_of(
    model: Model, sequences: Sequence[Sequence[int]], layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """All inputs of the down projections of one batch, ``{layer: [batch, length, d_in]}``.

    The pass ends at the last of the layers; what lies above it is never run.
    """
    seen: dict[int, torch.Tensor] = {}
    last = max(layers)
    with ExitStack() as hooks:
        for layer in layers:

            def look(module: Any, args: Any, layer: int = layer) -> None:
                seen[layer] = args[0].reshape(len(sequences), -1, args[0].shape[-1])
                if layer == last:
                    raise _EnoughError

            hooks.callback(model.module(layer).register_forward_pre_hook(look).remove)
        with suppress(_EnoughError):
            hidden(model, pad(sequences, model.device))
    return seen


def as_edit(deltas: Mapping[str, Delta]) -> Edit:
    """Deltas as a file stores them, for the model."""
    return {name: delta.to_torch() for name, delta in deltas.items()}


@contextmanager
def folded(model: Model, *edits: Edit) -> Iterator[None]:
    """The model with edits folded in and rounded to the served dtype, as an engine serves it.

    ``edits[0]`` first, on top of what lies under the model (:func:`beneath`). The
    weights are put back at the end, bit for bit.
    """
    kept: dict[str, torch.Tensor] = {}
    try:
        for name in dict.fromkeys(name for edit in edits for name in edit):
            deltas = [edit[name] for edit in (*model.under, *edits) if name in edit]
            new = fold(model.served(name).cpu(), [_plain(delta) for delta in deltas])
            parameter = model.parameter(name)
            kept[name] = parameter.detach().clone()
            value = new.T if model.architecture.transposed else new
            parameter.data.copy_(value.to(parameter.device, parameter.dtype))
        yield
    finally:
        for name, old in kept.items():
            model.parameter(name).data.copy_(old)


@contextmanager
def beneath(model: Model, *edits: Edit) -> Iterator[None]:
    """The model with a stack in force: what is computed inside is computed on top of it.

    Its weights are the folded ones; :meth:`Model.served` still gives the base's, which
    a patch names and an engine folds from.
    """
    names = {name for edit in edits for name in edit}
    before = model.under, model.pristine
    pristine = {name: model.served(name) for name in names}
    with folded(model, *edits):
        model.put_under((*model.under, *edits), {**model.pristine, **pristine})
        try:
            yield
        finally:
            model.put_under(*before)


def _plain(delta: LowRank) -> LowRank:
    return delta._replace(left=delta.left.detach().cpu(), right=delta.right.detach().cpu())


@torch.no_grad()
def answered(model: Model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[bool]:
    """Whether each answer is what the model says greedily: every token the arg-max.

    Args:
        model: run as it is; inside :func:`folded`, the patched one.
        pairs: ids of prompt and answer. Teacher-forced: a token is judged after the
            prompt and the answer's tokens before it.
    """
    result = [True] * len(pairs)
    whole = [[*prompt, *answer][:-1] for prompt, answer in pairs]
    for group in batches([len(s) for s in whole]):
        states = hidden(model, pad([whole[i] for i in group], model.device))
        places = [
            (row, len(pairs[i][0]) - 1 + j, token, i)
            for row, i in enumerate(group)
            for j, token in enumerate(pairs[i][1])
        ]
        rows, columns = [p[0] for p in places], [p[1] for p in places]
        best = logits(model, states[rows, columns]).argmax(-1).tolist()
        for (_, _, token, i), said in zip(places, best, strict=True):
            result[i] &= said == token
    return result


@torch.no_grad()
def next_tokens(model: Model, prompts: Sequence[Sequence[int]]) -> list[int]:
    """The id that follows each prompt greedily."""
    result = [0] * len(prompts)
    for group in batches([len(prompt) for prompt in prompts]):
        states = hidden(model, pad([prompts[i] for i in group], model.device))
        last = [len(prompts[i]) - 1 for i in group]
        best = logits(model, states[list(range(len(group))), last]).argmax(-1).tolist()
        for i, token in zip(group, best, strict=True):
            result[i] = token
    return result


@torch.no_grad()
def continuations(model: Model, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """At most ``tokens`` ids that follow each prompt greedily; after an end, whatever is there."""
    from transformers import GenerationConfig

    filler = model.tokenizer.eos_token_id or 0
    untyped: Any = GenerationConfig
    settings = untyped(do_sample=False, max_new_tokens=tokens, pad_token_id=filler)
    result: list[list[int]] = [[] for _ in prompts]
    for group in batches([len(prompt) for prompt in prompts], 4 * TOKENS):
        longest = max(len(prompts[i]) for i in group)
        # To the left, and masked: what is generated follows every prompt directly.
        gaps = [longest - len(prompts[i]) for i in group]
        ids = [[filler] * gap + list(prompts[i]) for i, gap in zip(group, gaps, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        with quiet():
            out = model.network.generate(
                torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=settings,
            )
        for i, line in zip(group, out[:, longest:].tolist(), strict=True):
            result[i] = line
    return result
