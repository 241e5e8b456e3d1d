"""The packages of the extra ``ship``."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ..errors import UsageError


def needed(name: str) -> ModuleType:
    """A module of the extra.

    Raises:
        UsageError: it isn't installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(
            f"Shipping needs the package {(error.name or name).partition('.')[0]}.",
            "pip install 'vllm-patcher[ship]'",
        ) from None
