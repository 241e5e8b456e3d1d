"""The methods by name. A method turns facts into deltas; everything else is shared."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UsageError
from .job import Deltas, Job
from .method_zero import zero

Method = Callable[[Job], Deltas]

METHODS: dict[str, Method] = {"zero": zero}


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none.
    """
    found = METHODS.get(name)
    if found is None:
        raise UsageError(f"Unknown method {name!r}.", f"There is {', '.join(METHODS)}.")
    return found
