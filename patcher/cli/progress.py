"""Progress for people: bars on a terminal, lines with ``-v`` elsewhere, else nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from patcher.cli.output import clean, note

if TYPE_CHECKING:
    import rich.progress


class Shown(Protocol):
    """What computing reports to; the same words as ``patcher.unlearn.progress.Progress``."""

    def start(self, what: str, total: int | None) -> None:
        """A step of so many parts begins; None where nobody knows."""

    def step(self, done: int, note: str = "") -> None:
        """So many parts are done; ``note`` has a figure, like the loss."""

    def finish(self) -> None:
        """The step is over."""


@contextmanager
def shown_progress(verbose: bool) -> Iterator[Shown]:
    """The right kind for this stderr; whatever happens, the terminal is left clean."""
    if not sys.stderr.isatty():
        yield _Lines(verbose)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    ) as bars:
        yield _Bars(bars)


class _Lines:
    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._what = self._note = ""
        self._began = 0.0

    def start(self, what: str, total: int | None) -> None:
        self._what, self._note, self._began = what, "", time.monotonic()
        if self._verbose:
            note(f"{what} …")

    def step(self, done: int, note: str = "") -> None:
        self._note = note or self._note

    def finish(self) -> None:
        if self._verbose:
            took = f"{time.monotonic() - self._began:.1f} s"
            note(f"{self._what}: {', '.join(filter(None, [took, clean(self._note)]))}")


class _Bars:
    def __init__(self, bars: rich.progress.Progress) -> None:
        self._bars = bars
        self._task: rich.progress.TaskID | None = None

    def start(self, what: str, total: int | None) -> None:
        self._task = self._bars.add_task(clean(what), total=total, note="")

    def step(self, done: int, note: str = "") -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done)
            if note:
                self._bars.update(self._task, note=clean(note))

    def finish(self) -> None:
        if self._task is None:
            return
        task = next(one for one in self._bars.tasks if one.id == self._task)
        # A step that ends early (or whose length nobody knew) is done all the same.
        self._bars.update(self._task, total=task.completed or 1, completed=task.completed or 1)
        self._bars.stop_task(self._task)
        self._task = None
