"""Admin tokens: made once, kept by the operator in a file, stored here only as hashes."""

from __future__ import annotations

import secrets
from enum import IntEnum
from pathlib import Path

from patcher.engine.store import Store
from patcher.errors import EngineRefusedError, PermissionDeniedError, RoleTooWeakError
from patcher.patch import files

TOKEN_BYTES = 32
OWNER = "admin"  # the name under which the token in the file acts


class Role(IntEnum):
    """Each role may do all that the ones below it may."""

    read = 1
    apply = 2
    admin = 3


def ensure_token(store: Store, path: Path) -> bool:
    """Make ``path`` hold a token (mode 0600) that the store knows; True where it was made now.

    Raises :class:`EngineRefusedError` where the file can't be read or made, or is empty.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = not path.exists()
        if made:
            files.create(path, secrets.token_urlsafe(TOKEN_BYTES).encode() + b"\n")
        token = path.read_text(encoding="ascii").strip()
        readable = path.stat().st_mode & 0o007
    except (OSError, UnicodeDecodeError) as error:
        raise EngineRefusedError(
            f"The token file {path} can't be used: {error}.", "Name another with --token-file."
        ) from error
    if readable:
        raise EngineRefusedError(
            f"Everybody on this machine can read the token file {path}.", f"Run: chmod 600 {path}"
        )
    if len(token) < 16:
        raise EngineRefusedError(
            f"The token in {path} has fewer than 16 characters.",
            "Delete the file, and the next start makes a new token.",
        )
    store.set_token(OWNER, Role.admin.name, token)
    return made


def authorise(store: Store | None, header: str | None, needed: Role) -> str:
    """The name of the token in an ``Authorization`` header, where its role reaches ``needed``.

    Raises :class:`PermissionDeniedError`, or :class:`RoleTooWeakError`, otherwise.
    """
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise PermissionDeniedError(
            "This needs patcher's token.",
            "Give it with PATCHER_TOKEN or --token-file; `patcher serve` prints where it lies.",
        )
    owner = None if store is None else store.token_owner(token.strip())
    if owner is None:
        raise PermissionDeniedError(
            "The engine doesn't know this token.", "Use the one in the engine's token file."
        )
    name, role = owner
    if Role[role] < needed:
        raise RoleTooWeakError(
            f"The token {name!r} has the role {role}; this needs {needed.name}.",
            "Use a token with that role.",
        )
    return name
