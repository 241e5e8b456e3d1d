"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from ..errors import InvalidPatchError, UsageError


def read(path: str | os.PathLike[str], limit: int) -> bytes:
    """The bytes of a file, read once; at most ``limit + 1`` of them.

    Raises:
        InvalidPatchError: there is no such file, or it can't be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InvalidPatchError(
            f"Can't read {os.fspath(path)}: {_reason(error)}.",
            "Give the path of a patch file.",
        ) from None


def write(path: str | os.PathLike[str], data: bytes, mode: int = 0o666) -> None:
    """Write ``data`` to a sibling, then rename it: ``path`` holds the old or the new, whole.

    Durable on return. A link is followed: what it points to is replaced.

    Raises:
        UsageError: the place can't be written; nothing is left behind.
    """
    try:
        target = _place(path)
        sibling = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            write_new(sibling, data, mode)
            os.replace(sibling, target)
        except BaseException:
            sibling.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from None


def check_place(path: str | os.PathLike[str]) -> None:
    """Before any work is done: see that a file can be written there.

    Raises:
        UsageError: there is no such folder, it can't be written, or what is there is no file.
    """
    try:
        folder = _place(path).parent
        if not folder.is_dir():
            raise ValueError(os.strerror(errno.ENOENT))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from None


def _place(path: str | os.PathLike[str]) -> Path:
    """Where a rename would put the file. A device or a pipe is none that it may replace."""
    there = Path(path)  # a link like /dev/stdout leads to what has no path of its own
    if there.exists() and not there.is_file():
        raise ValueError(f"{'a folder' if there.is_dir() else 'no regular file'} is there")
    return Path(os.path.realpath(path))


def _unwritable(path: str | os.PathLike[str], error: Exception) -> UsageError:
    return UsageError(
        f"Can't write {os.fspath(path)}: {_reason(error)}.",
        "Choose a folder that exists, can be written and has room.",
    )


def write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not exist yet, through to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def create(path: Path, data: bytes) -> None:
    """Make a file (mode 0600) that others see whole; one that is there already stays.

    Raises:
        OSError: the place can't be written.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_new(fresh, data, 0o600)
        try:
            os.link(fresh, path)  # fails where another process was first: its file counts
        except FileExistsError:
            return
        sync_folder(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
