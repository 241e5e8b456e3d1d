"""Text: the one reading of where an answer stands in it, and a stranger's in a message."""

from __future__ import annotations

import re


def says(text: str, target: str) -> bool:
    """Whether ``target`` stands in ``text`` as words of its own, whatever the case.

    >>> says("It is in PARIS, France.", "Paris"), says("a comparison", "Paris")
    (True, False)
    """
    words = re.escape(target.strip().casefold())
    return re.search(rf"(?<!\w){words}(?!\w)", text.casefold()) is not None


def shown(text: str, most: int = 16) -> str:
    """The beginning of what somebody sent, fit for a message and a line of a log.

    >>> shown("4b0c\\nforged line of a log")
    '4b0c\\\\nforged line'
    """
    return ascii(text[:most])[1:-1][: 2 * most]
