"""What a change led to, and how one that didn't is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from patcher.engine.observe import CHANGE, cause_of
from patcher.engine.stack import Stack
from patcher.engine.transition import Swapped
from patcher.errors import PatcherError, StackChangedError, StackRacedError
from patcher.protocol import GuardResult
from patcher.text import shown


@dataclass(frozen=True)
class Outcome:
    """What a change led to. ``seconds`` is all of it, ``swapped`` what it cost.

    ``changed``: False where the stack was in force already.
    """

    stack: Stack
    seconds: float
    swapped: Swapped = field(default_factory=Swapped)
    guards: Sequence[GuardResult] = ()
    questions: Sequence[str] = ()
    change: str = field(default_factory=CHANGE.get)
    changed: bool = True

    @property
    def pause_ms(self) -> float:
        """The engine's stop."""
        return self.swapped.pause_ms

    def as_dict(self) -> dict[str, Any]:
        """The wire form."""
        return {
            "change": self.change,
            "stack": list(self.stack.ids),
            "weight_version": self.stack.version,
            "seconds": round(self.seconds, 4),
            "pause_ms": round(self.swapped.pause_ms, 2),
            "mixed": self.swapped.mixed,
            "spaced_ms": round(self.swapped.spaced_ms, 2),
            "guards": list(self.guards),
            "questions": list(self.questions),
        }


def told_of(error: BaseException) -> dict[str, Any]:
    """What the ledger says of a change that failed; with the engine still, that, too."""
    if isinstance(error, PatcherError) and error.details.get("stands_still"):
        return {name: error.details[name] for name in ("cause", "stands_still")}
    return {"cause": cause_of(error)}


def depths(before: Stack, target: Stack) -> str:
    """How deep the stack was and is to be, for the log."""
    return f"{len(before.ids)}->{len(target.ids)}"


def outdated(if_match: str, stack: Stack, *, raced: bool) -> StackChangedError:
    """The error of a wish that was based on another stack than ``stack``, the one in force."""
    kind = StackRacedError if raced else StackChangedError
    cause = "Another change, asked for at once, was first" if raced else "It was changed"
    return kind(
        f"{cause}: the weight version in force is {stack.version[:16]}, not {shown(if_match)}.",
        "Look at `patcher status` and try again.",
        stack=list(stack.ids),
        weight_version=stack.version,
    )
