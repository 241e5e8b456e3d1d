"""Which requests went on over KV of several weights: told by the API server that changed them,
read by the one that answers them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from patcher.errors import EngineRefusedError

KEPT = 10_000  # ids; far more than run at once, and old ones are never asked for


class MixedRequests:
    """A file in the state folder that lists vLLM's (internal) request ids, the latest last."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "mixed.json"
        self._seen: tuple[int, int] | None = None  # inode and time of what was read
        self._ids: frozenset[str] = frozenset()

    def add(self, ids: Iterable[str]) -> None:
        """Append ``ids``; whoever reads sees all of them or none.

        Raises :class:`EngineRefusedError` where the file can't be written.
        """
        listed = list(dict.fromkeys([*self._read(), *ids]))[-KEPT:]
        fresh = self._path.with_suffix(".new")
        try:
            fresh.write_text(json.dumps(listed))
            fresh.replace(self._path)  # not synced: no request outlives the machine
        except OSError as error:
            raise EngineRefusedError(
                f"The requests that go on can't be noted in {self._path.parent}: {error}.",
                "See to the folder's disk and permissions.",
            ) from error

    def has_any(self, ids: Iterable[str]) -> bool:
        """Whether one of ``ids`` is listed. Costs a stat where nothing was added."""
        try:
            found = os.stat(self._path)
        except OSError:
            return False
        state = (found.st_ino, found.st_mtime_ns)
        if state != self._seen:
            self._ids, self._seen = frozenset(self._read()), state
        return not self._ids.isdisjoint(ids)

    def _read(self) -> list[str]:
        try:
            return [str(i) for i in json.loads(self._path.read_text())]
        except (OSError, ValueError):
            return []
