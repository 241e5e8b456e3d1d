"""The packages of the extra ``ship``."""

from __future__ import annotations

from types import ModuleType

from .. import extras


def needed(name: str) -> ModuleType:
    """A module of the extra ``ship``; raises UsageError where it isn't installed."""
    return extras.needed(name, "ship", "Shipping needs")
