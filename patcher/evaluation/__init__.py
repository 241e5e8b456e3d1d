"""Measuring a model and its patches as an engine would serve them.

``evaluate`` is loaded when it is first used: importing this package imports neither
torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measure import evaluate
    from .report import EvaluationReport, Figures

__all__ = ["EvaluationReport", "Figures", "evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from .measure import evaluate

        return evaluate
    if name in ("EvaluationReport", "Figures"):
        from . import report

        return getattr(report, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
