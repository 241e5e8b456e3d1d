"""The state folder: whose it is, which engine uses it, and who may change the stack now."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from patcher.errors import EngineRefusedError, StackConflictError

CLAIM_PATIENCE = 5.0  # seconds that a start waits for a sibling that claims the folder now
LOCK_PATIENCE = 180.0  # seconds that a change waits for another one, which may be draining


class StateFolder:
    """A folder that the API-server processes of one engine share.

    Its locks are files' and die with the process that held them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._claim: int | None = None

    @property
    def path(self) -> Path:
        """The database file."""
        return self.folder / "patcher.sqlite3"

    def check_owner(self) -> None:
        """Nobody else may write what decides which weights are served.

        Raises :class:`EngineRefusedError` where another user owns it, or everybody may.
        """
        for path in (self.folder, self.path):
            if not path.exists():
                continue
            found = path.stat()
            if found.st_uid not in (0, os.geteuid()):
                raise EngineRefusedError(
                    f"{path} belongs to another user (uid {found.st_uid}).",
                    f"If it is this engine's state, chown it to uid {os.geteuid()}.",
                )
            if found.st_mode & stat.S_IWOTH:
                raise EngineRefusedError(
                    f"{path} can be written by everybody.",
                    "See that nobody changed it (`patcher log`), then chmod o-w.",
                )

    def claim(self, instance: str) -> None:
        """Hold the folder for the engine ``instance`` until :meth:`release` or this process ends.

        The API servers of one engine share it. Raises :class:`EngineRefusedError` where
        another engine has it: two engines in one folder would undo each other's changes.
        """
        handle = self._lock_file("engine.lock")
        if _try_lock(handle):
            os.ftruncate(handle, 0)
            os.pwrite(handle, instance.encode(), 0)
        # Whoever comes first holds it alone while it writes: its sibling has to wait for that.
        shared = _lock(handle, CLAIM_PATIENCE, fcntl.LOCK_SH)
        if not shared or os.pread(handle, 256, 0).decode() != instance:
            os.close(handle)
            raise EngineRefusedError(
                f"Another engine uses the state folder {self.folder}.",
                "Give each engine a folder of its own with --state.",
            )
        self._claim = handle  # the lock lives as long as this process

    def release(self) -> None:
        """Let another engine have the folder."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    @contextlib.contextmanager
    def exclusive(
        self, patience: float = LOCK_PATIENCE, until: float | None = None
    ) -> Iterator[None]:
        """Hold the right to change the stack, across processes.

        ``until``: the end of those ``patience`` seconds by the steady clock, if they began before.
        Raises :class:`StackConflictError` when another change holds it until then.
        """
        handle = self._lock_file("change.lock")
        try:
            left = patience if until is None else until - time.monotonic()
            if not _lock(handle, left):
                raise too_long(patience)
            yield
        finally:
            os.close(handle)

    def changing(self) -> bool:
        """Whether a change is under way, in any process.

        Raises :class:`EngineRefusedError` where the folder doesn't tell.
        """
        handle = self._lock_file("change.lock")
        try:  # shared, so that two that look at once don't take each other for a change
            return not _try_lock(handle, fcntl.LOCK_SH)
        finally:
            os.close(handle)

    def _lock_file(self, name: str) -> int:
        try:
            return os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise _unusable(self.folder, error) from error


def too_long(patience: float) -> StackConflictError:
    """The error of a change that waited so many seconds for another one."""
    return StackConflictError(
        f"Another change has been under way for {patience:.0f} s.",
        "Look at `patcher status`, then try again.",
    )


def _unusable(folder: Path, error: OSError) -> EngineRefusedError:
    return EngineRefusedError(
        f"The state folder {folder} can't be used: {error.strerror}.",
        "See that its disk is there, has room and can be written, then try again.",
    )


def _lock(handle: int, patience: float, kind: int = fcntl.LOCK_EX) -> bool:
    """Try for ``patience`` seconds, at least once; whether the lock is held now."""
    deadline = time.monotonic() + patience
    while not _try_lock(handle, kind):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _try_lock(handle: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise EngineRefusedError(
            f"The state folder can't be locked: {error.strerror}.",
            "Put it on a disk with file locks (--state, PATCHER_STATE).",
        ) from error
    return True
