"""Measuring a model and its patches as an engine would serve them.

What is named here is loaded when it is first used: importing this package imports
neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measure import evaluate
    from .page import write_page
    from .readers import rows_from
    from .report import EvaluationReport, Figures

__all__ = ["EvaluationReport", "Figures", "evaluate", "rows_from", "write_page"]

_HOMES = {
    "EvaluationReport": "report",
    "Figures": "report",
    "evaluate": "measure",
    "rows_from": "readers",
    "write_page": "page",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
