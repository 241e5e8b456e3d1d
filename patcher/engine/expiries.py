"""When patches of the stack end: the table in the store, and what follows from it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from patcher.patch import Manifest

TABLE = """
CREATE TABLE IF NOT EXISTS expiries (
  id TEXT PRIMARY KEY, deadline REAL NOT NULL, ttl REAL NOT NULL) STRICT;
"""


@dataclass(frozen=True)
class Expiry:
    """``deadline`` in seconds since 1970, as this machine's clock had it; ``ttl`` in seconds."""

    deadline: float
    ttl: float


def read(db: sqlite3.Connection) -> dict[str, Expiry]:
    """The expiry of each patch that has one of its own."""
    rows = db.execute("SELECT id, deadline, ttl FROM expiries").fetchall()
    return {str(patch_id): Expiry(deadline, ttl) for patch_id, deadline, ttl in rows}


def keep(db: sqlite3.Connection, ids: Iterable[str], new: Mapping[str, Expiry] | None) -> None:
    """Of the patches ``ids`` those of ``new``; where that is None, those that they have."""
    kept = read(db) if new is None else new
    db.execute("DELETE FROM expiries")
    db.executemany(
        "INSERT INTO expiries VALUES (?, ?, ?)",
        [(i, kept[i].deadline, kept[i].ttl) for i in ids if i in kept],
    )


def drop(db: sqlite3.Connection, ids: Iterable[str]) -> None:
    """Let those patches stay."""
    db.executemany("DELETE FROM expiries WHERE id = ?", [(i,) for i in ids])


def deadlines(
    ids: Iterable[str], manifests: Mapping[str, Manifest], own: Mapping[str, float]
) -> dict[str, float]:
    """When each of the stack's ``ids`` (bottom first) ends.

    A patch ends with what it requires: the earliest of its own deadline and of theirs.
    """
    ends: dict[str, float] = {}
    for patch_id in ids:
        below = [ends[i] for i in manifests[patch_id].requires if i in ends]
        mine = [own[patch_id]] if patch_id in own else []
        if mine or below:
            ends[patch_id] = min(mine + below)
    return ends
