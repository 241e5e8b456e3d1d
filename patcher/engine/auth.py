"""Admin tokens: made once, kept by the operator in a file, stored here only as hashes."""

from __future__ import annotations

import re
import secrets
from enum import IntEnum
from pathlib import Path

from patcher.engine.lifetimes import ACTOR
from patcher.engine.store import Store
from patcher.errors import (
    EngineRefusedError,
    PermissionDeniedError,
    RoleTooWeakError,
    UsageError,
)
from patcher.patch import files
from patcher.text import NAME, shown

TOKEN_BYTES = 32
OWNER = "admin"  # the name under which the token in the file acts
RESERVED = (OWNER, ACTOR)  # names that the ledger has for the operator and for a time that ended


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


def issue(store: Store, name: str, role: str) -> str:
    """A new token of that role, in place of one that had the name; only its hash is kept.

    Raises :class:`UsageError` for a name that can't be one, or is the operator's own.
    """
    if not re.fullmatch(NAME, name) or name in RESERVED:
        raise UsageError(
            f"A token can't be called {shown(name, 64)!r}.",
            f"Give up to 64 letters, digits and . _ @ + -, but not {' or '.join(RESERVED)}.",
        )
    token = secrets.token_urlsafe(TOKEN_BYTES)
    store.set_token(name, Role[role].name, token)
    return token


def withdraw(store: Store, name: str) -> None:
    """Take a token back.

    Raises :class:`UsageError` where no token has the name, or it is the operator's own.
    """
    if name in RESERVED or not store.drop_token(name):
        raise UsageError(
            f"There is no token {shown(name, 64)!r} that can be taken back.",
            "The operator's own is in the token file: put another one there and restart.",
        )


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
            f"Use one that has it: `patcher token NAME --role {needed.name}` makes one.",
        )
    return name
