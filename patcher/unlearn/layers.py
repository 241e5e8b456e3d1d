"""Which layers an edit goes into (docs/methods.md, "Layers")."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError

FROM = 0.1  # of the depth: where a subject's tokens have been read and little is built on them
COUNT = 3  # several layers share the change, each one's part is small


def is_auto(wish: str | Sequence[int]) -> bool:
    """Whether the layers are to be found (:mod:`patcher.unlearn.tracing`)."""
    return isinstance(wish, str) and wish.strip().lower() == "auto"


def by_depth(layers: int) -> list[int]:
    """Three in a row from a tenth of the depth: where nothing can be measured."""
    first = min(round(FROM * layers), max(0, layers - COUNT))
    return list(range(first, min(first + COUNT, layers)))


def choose_layers(wish: str | Sequence[int], layers: int) -> list[int]:
    """Zero-based layers, ascending, of a model that has ``layers`` of them.

    ``auto``: :func:`by_depth`, which :mod:`patcher.unlearn.tracing` replaces once the
    facts have been looked at. Otherwise ``"9,10,11"`` or a sequence of numbers.

    Raises:
        UsageError: not numbers, out of range, twice the same, none.
    """
    if is_auto(wish):
        return by_depth(layers)
    try:
        if isinstance(wish, str):
            chosen = [int(part) for part in wish.split(",")]
        else:
            chosen = [_whole(part) for part in wish]
    except (TypeError, ValueError):
        raise UsageError(
            f"Can't read the layers {wish!r}.", 'Give "auto" or numbers like "3,4,5".'
        ) from None
    if not chosen or len(set(chosen)) < len(chosen):
        raise UsageError(f"The layers {wish!r} are none, or one twice.", "Name each once.")
    if min(chosen) < 0 or max(chosen) >= layers:
        raise UsageError(
            f"The layers {wish!r} are out of range.",
            f"The model has {layers}: 0 to {layers - 1}.",
        )
    return sorted(chosen)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value
