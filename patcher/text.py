"""The one reading of where an answer stands in a text."""

from __future__ import annotations

import re


def says(text: str, target: str) -> bool:
    """Whether ``target`` stands in ``text`` as words of its own, whatever the case.

    >>> says("It is in PARIS, France.", "Paris"), says("a comparison", "Paris")
    (True, False)
    """
    words = re.escape(target.strip().casefold())
    return re.search(rf"(?<!\w){words}(?!\w)", text.casefold()) is not None
