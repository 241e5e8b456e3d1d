"""Running a model from one layer and one token on, on what was kept from a full pass.

The network's own forward runs, so masks, positions and whatever follows the layers are
its own; only the layers below are stepped over, and the hidden state is put in where
they would have left theirs. What stands before the first token that changes is in the
cache that the network has for generating.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch

from .forward import batches, hidden, pad
from .models import Model

Span = tuple[int, int]  # of a sequence, from the one token to before the other

CLOSE = 1e-3  # of the largest state: how near a pass over a cache comes to one without


class Past(NamedTuple):
    """What a pass sees of the tokens before those that it is given, to the right of a gap.

    ``attention``: by layer keys and values ``[batch, heads, before, d_head]``. ``mask``
    ``[batch, before + length]``: 0 in the gap. ``places`` ``[batch, length]``: of the tokens given.
    """

    attention: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    mask: torch.Tensor
    places: torch.Tensor

    def rows(self, chosen: torch.Tensor) -> Past:
        """Those rows of the batch."""
        own = tuple((key[chosen], value[chosen]) for key, value in self.attention)
        return Past(own, self.mask[chosen], self.places[chosen])


class Entering(NamedTuple):
    """What enters a layer, and how the layers below answer.

    ``ids [batch, length]``, ``states [batch, length, d]``: of the tokens that a pass is
    given. ``parts``: how many things a layer returns, the hidden state first; 0: it alone.
    ``full``: the full pass's last states, of all ids, to compare with; None: it ended here.
    """

    layer: int
    ids: torch.Tensor
    states: torch.Tensor
    parts: int
    past: Past | None = None
    full: torch.Tensor | None = None

    def rows(self, chosen: torch.Tensor) -> Entering:
        """Those rows of the batch; the full pass's are not kept."""
        past = self.past and self.past.rows(chosen)
        return self._replace(ids=self.ids[chosen], states=self.states[chosen], past=past, full=None)


class _EnoughError(Exception):
    """Raised inside a forward pass once all that is asked for has been seen."""


def _layers(model: Model) -> Any:
    return model.network.get_submodule(model.architecture.layers)


@torch.no_grad()
def entering(
    model: Model, ids: torch.Tensor, layer: int, spans: Sequence[Span] | None = None
) -> Entering:
    """What enters that layer on ids ``[batch, length]``.

    ``spans``: what of each a pass will be given; of the tokens before it the attention's
    keys and values are kept. None: all is given.
    """
    seen: list[torch.Tensor] = []
    parts = 0
    cache = _cache(()) if spans else None
    full: torch.Tensor | None = None

    def look(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        if spans is None:
            raise _EnoughError

    def count(_: Any, __: Any, out: Any) -> None:
        nonlocal parts
        parts = len(out) if isinstance(out, tuple) else 0

    layers = _layers(model)
    with ExitStack() as hooks, suppress(_EnoughError):
        hooks.callback(layers[layer].register_forward_pre_hook(look, with_kwargs=True).remove)
        hooks.callback(layers[0].register_forward_hook(count).remove)
        full = hidden(model, ids, past_key_values=cache, use_cache=cache is not None)
    whole = Entering(layer, ids, seen[0], parts, full=full)
    return _over(whole, spans, cache) if spans else whole


def _over(whole: Entering, spans: Sequence[Span], cache: Any) -> Entering:
    """Of what a full pass left, that which a pass over those spans needs."""
    device, length = whole.ids.device, whole.ids.shape[1]
    rows = torch.arange(len(spans), device=device)[:, None]
    begin = torch.tensor([first for first, _ in spans], device=device)[:, None]
    before, longest = int(begin.max()), max(end - first for first, end in spans)
    places = begin + torch.arange(longest, device=device)
    places = places.clamp(max=length - 1)  # beyond its end, where nobody looks
    earlier = begin - before + torch.arange(before, device=device)
    mask = torch.cat([earlier >= 0, torch.ones_like(places, dtype=torch.bool)], 1).long()
    earlier = earlier.clamp(min=0)

    def chosen(what: torch.Tensor) -> torch.Tensor:
        return what.transpose(1, 2)[rows, earlier].transpose(1, 2)

    kept = tuple((chosen(layer.keys), chosen(layer.values)) for layer in cache.layers)
    past = Past(kept, mask, places)
    ids, states = whole.ids[rows, places], whole.states[rows, places]
    return whole._replace(ids=ids, states=states, past=past)


def _cache(attention: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """A cache that holds these and whatever a pass adds; never cut to a window."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    for layer, (key, value) in enumerate(attention):
        cache.update(key, value, layer)
    return cache


def upwards(model: Model, kept: Entering) -> torch.Tensor:
    """The last hidden states ``[batch, length, d]`` of a pass that begins at what was kept."""
    more: dict[str, Any] = {}
    if kept.past is not None:
        more = {
            "past_key_values": _cache(kept.past.attention),
            "use_cache": True,
            "attention_mask": kept.past.mask,
            "position_ids": kept.past.places,
        }
    with _stepping_over(model, kept):
        return hidden(model, kept.ids, **more)


@contextmanager
def _stepping_over(model: Model, kept: Entering) -> Iterator[None]:
    """Inside, a pass begins at ``kept.layer`` with ``kept.states``."""

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
def agrees(model: Model, ids: torch.Tensor, spans: Sequence[Span] | None, kept: Entering) -> bool:
    """Whether a pass from there gives the full pass's states, of those spans of ``ids``.

    Bit for bit, or, over a cache, as near as another order of sums.
    """
    full = hidden(model, ids) if kept.full is None else kept.full
    part = upwards(model, kept)
    if spans is None:
        return torch.equal(full, part)
    near = CLOSE * full.abs().max()
    return all(
        bool((full[i, first:end] - part[i, : end - first]).abs().max() <= near)
        for i, (first, end) in enumerate(spans)
    )


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
