"""Packages of extras: imported when they are used, named when they are missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from patcher.errors import UsageError


def needed(name: str, extra: str, who: str) -> ModuleType:
    """The module ``name`` of the optional dependencies ``extra``.

    ``who``: what needs it, with its verb, for the message.

    Raises :class:`UsageError` where it isn't installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(
            f"{who} the package {(error.name or name).partition('.')[0]}.",
            f"pip install 'vllm-patcher[{extra}]'",
        ) from None
