"""How a long computation tells what it is doing, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of one step of work after the other; the CLI draws it, tests record it."""

    def start(self, what: str, total: int | None) -> None:
        """A step begins; ``total`` is how much there is to do, None where nobody knows."""

    def step(self, done: int, note: str = "") -> None:
        """``done`` of it is done (counted from the step's start)."""

    def finish(self) -> None:
        """The step that was started last is over."""


class Silent:
    """A :class:`Progress` that tells nobody."""

    def start(self, what: str, total: int | None) -> None:
        """Nothing."""

    def step(self, done: int, note: str = "") -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""
