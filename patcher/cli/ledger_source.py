"""Where ``patcher log`` reads: a running engine, or a file that was exported from one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.errors import UsageError, VerificationError
from patcher.ledger_files import parse
from patcher.record import Expected, Proof, prove, proven

if TYPE_CHECKING:
    from patcher.client import Engine
    from patcher.protocol import LedgerEntry


class Source:
    """An engine's ledger."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def entries(self, after: int = 0) -> list[LedgerEntry]:
        """The entries after that number."""
        return self._engine.ledger(after)

    def prove(self, expected: Expected | None) -> tuple[Proof, bool]:
        """The proof, and whether an engine's stack was compared."""
        return proven(self._engine, expected)[0], True


class FileSource(Source):
    """An exported ledger, which anybody may have written."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._entries, self._faults = parse(file)

    def entries(self, after: int = 0) -> list[LedgerEntry]:
        """The entries after that number.

        Raises :class:`~patcher.errors.VerificationError` where a line is none.
        """
        if self._faults:
            raise VerificationError(
                f"The file is not a whole ledger: {self._faults[0]}.", "Export it again."
            )
        return [entry for entry in self._entries if entry["seq"] > after]

    def prove(self, expected: Expected | None) -> tuple[Proof, bool]:
        """The same of the file alone."""
        proof = prove(self._entries, expected)
        return replace(proof, faults=[*self._faults, *proof.faults]), False


@contextmanager
def opened(path: Path | None, url: str | None, token: str | None) -> Iterator[Source]:
    """The source that was named; a file goes before an engine."""
    if path is not None:
        yield FileSource(path)
        return
    if not url:
        raise UsageError(
            "No engine named.", "Give --engine URL, set PATCHER_ENGINE, or give --file."
        )
    from patcher.client import Engine

    with Engine(url, token) as engine:
        yield Source(engine)
