"""Livepatch for the weights of a served language model.

::

    import patcher

    patcher.compute("my-model", "forget.jsonl", "forget.st")   # make a patch
    patcher.evaluate("my-model", patches=["forget.st"], forget="forget.jsonl")
    with patcher.Engine("http://127.0.0.1:8000", token="...") as engine:
        change = engine.apply("forget.st")                      # live, no request dropped
        engine.revert(all=True)                                 # the base again, bit for bit

Names are loaded when they are first used: ``import patcher`` alone imports neither
torch nor vLLM nor an HTTP library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from patcher.errors import (
    AlreadyAppliedError,
    AmbiguousIdError,
    BarsNotMetError,
    BaseMismatchError,
    EngineRefusedError,
    EngineUnreachableError,
    ForgetSetError,
    FormatVersionError,
    GuardBreachedError,
    InputError,
    InvalidPatchError,
    ModelError,
    NotEnoughMemoryError,
    NumericalError,
    PatcherError,
    PermissionDeniedError,
    RoleTooWeakError,
    ShippingError,
    StackChangedError,
    StackConflictError,
    StackRacedError,
    TrustError,
    UnknownPatchError,
    UsageError,
    VerificationError,
)

if TYPE_CHECKING:
    from patcher.client import Engine
    from patcher.engine.offline import attach
    from patcher.evaluation import evaluate
    from patcher.patch import Patch
    from patcher.unlearn import compute

    __version__: str

__all__ = [
    "AlreadyAppliedError",
    "AmbiguousIdError",
    "BarsNotMetError",
    "BaseMismatchError",
    "Engine",
    "EngineRefusedError",
    "EngineUnreachableError",
    "ForgetSetError",
    "FormatVersionError",
    "GuardBreachedError",
    "InputError",
    "InvalidPatchError",
    "ModelError",
    "NotEnoughMemoryError",
    "NumericalError",
    "Patch",
    "PatcherError",
    "PermissionDeniedError",
    "RoleTooWeakError",
    "ShippingError",
    "StackChangedError",
    "StackConflictError",
    "StackRacedError",
    "TrustError",
    "UnknownPatchError",
    "UsageError",
    "VerificationError",
    "__version__",
    "attach",
    "compute",
    "evaluate",
]

# name -> the module that has it
_LAZY = {
    "Engine": "patcher.client",
    "Patch": "patcher.patch",
    "attach": "patcher.engine.offline",
    "compute": "patcher.unlearn",
    "evaluate": "patcher.evaluation",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("vllm-patcher")
    elif name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module 'patcher' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
