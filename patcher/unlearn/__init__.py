"""Computing edits: a forget set and a model in, a patch out.

``compute`` is loaded when it is first used, so that importing this package for its
small parts (:class:`Progress`) imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .bars import Bars
from .progress import Progress

if TYPE_CHECKING:
    from .pipeline import ComputeResult, compute

__all__ = ["Bars", "ComputeResult", "Progress", "compute"]


def __getattr__(name: str) -> Any:
    if name in ("ComputeResult", "compute"):
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
