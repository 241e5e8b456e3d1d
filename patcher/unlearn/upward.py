"""Running a model from one layer upwards, on hidden states that were kept from a full pass.

The network's own forward runs, so masks, positions and whatever follows the layers are
its own; only the layers below are stepped over, and the hidden state is put in where
they would have left theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch

from .forward import batches, hidden, pad
from .models import Model


class Entering(NamedTuple):
    """What enters a layer: ``states [batch, length, d]``, and how the layers below answer.

    ``parts``: how many things a layer returns, the hidden state first; 0: it alone.
    """

    layer: int
    states: torch.Tensor
    parts: int

    def rows(self, chosen: torch.Tensor) -> Entering:
        """Those rows of the batch."""
        return self._replace(states=self.states[chosen])


class _EnoughError(Exception):
    """Raised inside a forward pass once all that is asked for has been seen."""


def _layers(model: Model) -> Any:
    return model.network.get_submodule(model.architecture.layers)


@torch.no_grad()
def entering(model: Model, ids: torch.Tensor, layer: int) -> Entering:
    """What enters that layer on ids ``[batch, length]``; the pass ends there."""
    seen: list[torch.Tensor] = []
    parts = 0

    def look(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _EnoughError

    def count(_: Any, __: Any, out: Any) -> None:
        nonlocal parts
        parts = len(out) if isinstance(out, tuple) else 0

    layers = _layers(model)
    with ExitStack() as hooks, suppress(_EnoughError):
        hooks.callback(layers[layer].register_forward_pre_hook(look, with_kwargs=True).remove)
        hooks.callback(layers[0].register_forward_hook(count).remove)
        hidden(model, ids)
    return Entering(layer, seen[0], parts)


@contextmanager
def stepping_over(model: Model, kept: Entering) -> Iterator[None]:
    """Inside, a pass begins at ``kept.layer`` with ``kept.states``; give it the same ids."""

    def skip(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *[None] * (kept.parts - 1)) if kept.parts else states

    def put(_: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (kept.states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kept.states}

    layers = _layers(model)
    with ExitStack() as undo:
        for layer in layers[: kept.layer]:
            vars(layer)["forward"] = skip  # shadows the class's for as long as it is there
            undo.callback(vars(layer).pop, "forward")
        handle = layers[kept.layer].register_forward_pre_hook(put, with_kwargs=True)
        undo.callback(handle.remove)
        yield


@torch.no_grad()
def agrees(model: Model, ids: torch.Tensor, kept: Entering) -> bool:
    """Whether a pass from the layer upwards gives the full pass's states, bit for bit."""
    full = hidden(model, ids)
    with stepping_over(model, kept):
        return torch.equal(full, hidden(model, ids))


@contextmanager
def added(model: Model, layer: int, change: torch.Tensor, at: torch.Tensor) -> Iterator[None]:
    """Inside, the layer's down projection puts out ``change [b, d_out]`` more.

    ``at`` ``[b]``: of each row of the batch, at which position.
    """

    def add(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        flat = out.reshape(-1, out.shape[-1])  # some models flatten the batch for their MLP
        begins = torch.arange(len(at), device=at.device) * (len(flat) // len(at))
        return flat.index_add(0, begins + at, change).reshape(out.shape)

    handle = model.module(layer).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def leaving(
    model: Model,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[int],
    layer: int,
    change: torch.Tensor | None = None,
) -> torch.Tensor:
    """The hidden state ``[n, d]`` that leaves a layer, at one position a sequence.

    ``change [n, d_out]``: what is added there to the output of the layer's down projection.
    """
    found: list[torch.Tensor] = []
    order: list[int] = []
    module = _layers(model)[layer]
    for group in batches([len(s) for s in sequences]):
        order += group
        at = torch.tensor([positions[i] for i in group], device=model.device)
        with ExitStack() as stack:
            if change is not None:
                stack.enter_context(added(model, layer, change[group], at))
            hook = module.register_forward_hook(_looking(found, at))
            stack.callback(hook.remove)
            stack.enter_context(suppress(_EnoughError))
            hidden(model, pad([sequences[i] for i in group], model.device))
    back = torch.tensor(order).argsort().to(model.device)
    return torch.cat(found)[back]


def _looking(found: list[torch.Tensor], at: torch.Tensor) -> Callable[[Any, Any, Any], None]:
    def look(_: Any, __: Any, out: Any) -> None:
        states = out[0] if isinstance(out, tuple) else out
        rows = torch.arange(len(at), device=at.device)
        found.append(states.reshape(len(at), -1, states.shape[-1])[rows, at])
        raise _EnoughError

    return look
