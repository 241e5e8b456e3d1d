"""Durations as people write them."""

from __future__ import annotations

import math
import re

from patcher.errors import UsageError

LONGEST = 366 * 86400.0  # seconds
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)([smhdw])", re.ASCII)


def seconds(duration: str | float) -> float:
    """Seconds of a duration: a number of them, or a text like ``90s``, ``2h`` or ``1d12h``.

    Raises :class:`~patcher.errors.UsageError` for anything else, nothing at all, and for
    more than 366 days.

    >>> seconds("2h"), seconds("1h30m"), seconds(0.5)
    (7200.0, 5400.0, 0.5)
    """
    if isinstance(duration, str):
        text = duration.strip().lower()
        if not text or _PART.sub("", text):
            raise UsageError(
                f"{duration[:40]!r} is not a duration.", "Write it like 90s, 30m, 2h, 1d12h or 2w."
            )
        value = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    else:
        value = float(duration)
    if not (math.isfinite(value) and 0 < value <= LONGEST):
        raise UsageError(
            f"A duration of {duration!r} is out of range.", "Give more than nothing, at most 366d."
        )
    return value
