"""Durable state of one served model: patches, stack, ledger and tokens in one SQLite database.

Several API-server processes share it. Every write is a transaction of its own with
``synchronous=FULL``, so what returned is on disk. Changes of the stack are serialised
by :meth:`Store.exclusive`, a lock that dies with the process that held it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher.engine import expiries, signatures
from patcher.engine.folder import StateFolder
from patcher.engine.stack import Stack
from patcher.errors import EngineRefusedError, UnknownPatchError
from patcher.ledger import GENESIS, chain, detail_text
from patcher.moments import now
from patcher.patch import Manifest, Patch
from patcher.text import shown

SCHEMA_VERSION = 1
BUSY_PATIENCE = 30.0  # seconds that a statement waits for another process's transaction

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS patches (
  id TEXT PRIMARY KEY, title TEXT NOT NULL, stored TEXT NOT NULL, data BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS stack (
  position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE REFERENCES patches, since TEXT NOT NULL)
  STRICT;
CREATE TABLE IF NOT EXISTS ledger (
  seq INTEGER PRIMARY KEY, time TEXT NOT NULL, event TEXT NOT NULL, detail TEXT NOT NULL,
  previous TEXT NOT NULL, hash TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS modules (name TEXT PRIMARY KEY, base TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS tokens (
  name TEXT PRIMARY KEY, role TEXT NOT NULL, hash TEXT NOT NULL UNIQUE, created TEXT NOT NULL)
  STRICT;
"""


@dataclass(frozen=True)
class StoredPatch:
    """What a listing tells of a patch; ``bytes`` is the size of the file."""

    id: str
    title: str
    stored: str
    bytes: int


class Store(StateFolder):
    """The state folder (mode 0700) and the database in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._known: dict[str, tuple[Manifest, dict[str, int]]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.check_owner()
            with self._transaction() as db:
                for statement in (_SCHEMA + expiries.TABLE + signatures.TABLE).split(";"):
                    db.execute(statement)
                db.execute(
                    "INSERT OR IGNORE INTO meta VALUES ('schema', ?)", (str(SCHEMA_VERSION),)
                )
            self.path.chmod(0o600)
        except OSError as error:
            raise EngineRefusedError(
                f"The state folder {folder} can't be used: {error}.",
                "Give a folder that the server may write with --state or PATCHER_STATE.",
            ) from error
        found = self._meta("schema")
        if found != str(SCHEMA_VERSION):
            raise EngineRefusedError(
                f"The state in {folder} has schema {found}; this version reads {SCHEMA_VERSION}.",
                "Use the patcher that wrote it, or another state folder.",
            )

    # -- connections -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(
                sqlite3.connect(self.path, timeout=BUSY_PATIENCE, isolation_level=None)
            ) as db:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=FULL")
                db.execute("PRAGMA foreign_keys=ON")
                yield db
        except sqlite3.Error as error:
            raise EngineRefusedError(
                f"The state in {self.folder} can't be used: {error}.",
                "See to the folder's disk and permissions; what was committed is kept.",
            ) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def _meta(self, key: str) -> str | None:
        with self._connection() as db:
            row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    # -- patches -----------------------------------------------------------------------------

    def add_patch(self, patch: Patch, actor: str, client: str = "") -> bool:
        """Store ``patch``; False where it was there already."""
        with self._transaction() as db:
            added = db.execute(
                "INSERT OR IGNORE INTO patches VALUES (?, ?, ?, ?)",
                (patch.id, patch.manifest.title, now(), patch.data),
            ).rowcount
            if added:
                by = {"actor": actor, "client": client}
                self._append(db, "patch-stored", {"patch": patch.id, **by})
        return bool(added)

    def patch_bytes(self, patch_id: str) -> bytes:
        """The file's bytes, checked against their id.

        Raises :class:`UnknownPatchError` where there is none, and
        :class:`EngineRefusedError` where the stored bytes were damaged.
        """
        with self._connection() as db:
            row = db.execute("SELECT data FROM patches WHERE id = ?", (patch_id,)).fetchone()
        if row is None:
            raise UnknownPatchError(
                f"The engine holds no patch {shown(patch_id)}.", "List them with `patcher status`."
            )
        data = bytes(row[0])
        if hashlib.sha256(data).hexdigest() != patch_id:
            raise EngineRefusedError(
                f"The stored bytes of patch {patch_id[:16]} are damaged.",
                "Restore the state folder from a backup, or start with --no-restore.",
            )
        return data

    def add_signature(self, patch_id: str, bundle: bytes, actor: str, signer: str | None) -> bool:
        """Store a bundle of a stored patch; False where it was there already."""
        with self._transaction() as db:
            digest = signatures.add(db, patch_id, bundle, signer, now())
            if digest is not None:
                detail = {"patch": patch_id, "signature": digest, "signer": signer, "actor": actor}
                self._append(db, "signature-stored", detail)
        return digest is not None

    def signatures(self, patch_id: str) -> list[bytes]:
        """The bundles of a stored patch, the oldest first."""
        with self._connection() as db:
            return signatures.read(db, patch_id)

    def patches(self) -> list[StoredPatch]:
        """All stored patches, oldest first."""
        with self._connection() as db:
            rows = db.execute(
                "SELECT id, title, stored, length(data) FROM patches ORDER BY stored, id"
            ).fetchall()
        return [StoredPatch(*row) for row in rows]

    def manifests(self) -> dict[str, Manifest]:
        """The manifest of every stored patch."""
        return {patch_id: manifest for patch_id, (manifest, _) in self._read().items()}

    def ranks(self, patch_id: str) -> dict[str, int]:
        """The rank of a stored patch's delta on each of its modules."""
        return self._read()[patch_id][1]

    def _read(self) -> dict[str, tuple[Manifest, dict[str, int]]]:
        """What is told of each stored patch; each is read once, since an id never changes."""
        for stored in self.patches():
            if stored.id not in self._known:
                patch = Patch.from_bytes(self.patch_bytes(stored.id))
                ranks = {name: delta.rank for name, delta in patch.deltas.items()}
                self._known[stored.id] = (patch.manifest, ranks)
        return dict(self._known)

    # -- stack -------------------------------------------------------------------------------

    def committed(self) -> Stack:
        """The stack that was last committed, in force or not."""
        return Stack(tuple(patch_id for patch_id, _ in self.since()))

    def since(self) -> list[tuple[str, str]]:
        """Each committed id with the time since which it is in force."""
        with self._connection() as db:
            return [
                (str(i), str(t))
                for i, t in db.execute("SELECT id, since FROM stack ORDER BY position")
            ]

    def in_force(self) -> Stack:
        """The stack that the engine must be serving: nothing after a start without restore."""
        return Stack() if self.suspended else self.committed()

    @property
    def suspended(self) -> bool:
        """Whether this start left the committed stack out (``--no-restore``)."""
        return self._meta("suspended") == "1"

    def suspend(self, suspended: bool, event: str, detail: dict[str, Any]) -> None:
        """Record a start: with the committed stack, or without it."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO meta VALUES ('suspended', ?)", ("1" if suspended else "0",)
            )
            self._append(db, event, detail)

    def commit(
        self,
        stack: Stack,
        event: str,
        detail: dict[str, Any],
        expires: Mapping[str, expiries.Expiry] | None = None,
    ) -> None:
        """Make ``stack`` the committed one and append the outcome, in one transaction.

        ``expires`` has the patches that don't stay; None: those of before that are left.
        """
        read = self._read()
        bases = [
            (name, module.model_dump_json())
            for patch_id in stack.ids
            if patch_id in read
            for name, module in read[patch_id][0].base.modules.items()
        ]
        with self._transaction() as db:
            since = dict(db.execute("SELECT id, since FROM stack").fetchall())
            moment = now()
            db.execute("DELETE FROM stack")
            db.executemany(
                "INSERT INTO stack VALUES (?, ?, ?)",
                [(p, i, since.get(i, moment)) for p, i in enumerate(stack.ids)],
            )
            expiries.keep(db, stack.ids, expires)
            db.executemany("INSERT OR IGNORE INTO modules VALUES (?, ?)", bases)
            db.execute("INSERT OR REPLACE INTO meta VALUES ('suspended', '0')")
            self._append(db, event, detail)

    def expiries(self) -> dict[str, expiries.Expiry]:
        """The committed patches that have a time to live of their own."""
        with self._connection() as db:
            return expiries.read(db)

    def confirm(self, ids: Sequence[str], event: str, detail: dict[str, Any]) -> None:
        """Let patches stay, and record it."""
        with self._transaction() as db:
            expiries.drop(db, ids)
            self._append(db, event, detail)

    def known_modules(self) -> list[tuple[str, dict[str, Any]]]:
        """Every module that a committed patch ever named, with its base as in the manifest."""
        with self._connection() as db:
            rows = db.execute("SELECT name, base FROM modules ORDER BY name").fetchall()
        return [(str(name), json.loads(base)) for name, base in rows]

    @property
    def drift(self) -> list[str]:
        """The modules that were found to be something else than what was put there."""
        names: list[str] = json.loads(self._meta("drift") or "[]")
        return names

    def set_drift(self, modules: list[str]) -> None:
        """Note which modules drifted; the ledger tells when that changes."""
        if modules == self.drift:
            return
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('drift', ?)", (json.dumps(modules),))
            self._append(db, "drift-found" if modules else "drift-gone", {"modules": modules})

    @property
    def unclean(self) -> bool:
        """Whether a rollback began that did not end."""
        return self._meta("unclean") == "1"

    def set_unclean(self, unclean: bool) -> None:
        """Note that a rollback begins, or that it ended."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('unclean', ?)", (str(int(unclean)),))

    # -- ledger ------------------------------------------------------------------------------

    def record(self, event: str, detail: dict[str, Any]) -> int:
        """Append an entry and return its number."""
        with self._transaction() as db:
            return self._append(db, event, detail)

    @staticmethod
    def _append(db: sqlite3.Connection, event: str, detail: dict[str, Any]) -> int:
        last = db.execute("SELECT seq, hash FROM ledger ORDER BY seq DESC LIMIT 1").fetchone()
        seq, previous = (last[0] + 1, last[1]) if last else (1, GENESIS)
        moment = now()
        text = detail_text(detail)
        db.execute(
            "INSERT INTO ledger VALUES (?, ?, ?, ?, ?, ?)",
            (seq, moment, event, text, previous, chain(previous, seq, moment, event, text)),
        )
        return int(seq)

    def ledger(self, after: int = 0) -> list[dict[str, Any]]:
        """The entries with a number above ``after``, oldest first."""
        with self._connection() as db:
            rows = db.execute(
                "SELECT seq, time, event, detail, previous, hash FROM ledger WHERE seq > ?"
                " ORDER BY seq",
                (after,),
            ).fetchall()
        keys = ("seq", "time", "event", "detail", "previous", "hash")
        return [{**dict(zip(keys, row, strict=True)), "detail": json.loads(row[3])} for row in rows]

    def interrupted(self) -> dict[str, Any] | None:
        """The detail of a change's intent that neither success nor failure followed, or None."""
        with self._connection() as db:
            row = db.execute(
                "SELECT event, detail FROM ledger WHERE event LIKE 'change-%'"
                " ORDER BY seq DESC LIMIT 1"
            ).fetchone()
        if row is None or row[0] != "change-intent":
            return None
        detail: dict[str, Any] = json.loads(row[1])
        return detail

    # -- tokens ------------------------------------------------------------------------------

    def set_token(self, name: str, role: str, token: str) -> None:
        """Store the hash of ``token`` under ``name``, in place of what was there."""
        digest = hashlib.sha256(token.encode()).hexdigest()
        with self._transaction() as db:
            found = db.execute("SELECT hash FROM tokens WHERE name = ?", (name,)).fetchone()
            if found is not None and found[0] == digest:
                return
            db.execute(
                "INSERT OR REPLACE INTO tokens VALUES (?, ?, ?, ?)", (name, role, digest, now())
            )
            self._append(db, "token-set", {"name": name, "role": role})

    def drop_token(self, name: str) -> bool:
        """Forget the token of that name; whether there was one."""
        with self._transaction() as db:
            found = db.execute("DELETE FROM tokens WHERE name = ?", (name,)).rowcount
            if found:
                self._append(db, "token-removed", {"name": name})
        return bool(found)

    def token_owner(self, token: str) -> tuple[str, str] | None:
        """``(name, role)`` of the token, or None where nobody has it."""
        digest = hashlib.sha256(token.encode()).hexdigest()
        with self._connection() as db:
            row = db.execute("SELECT name, role FROM tokens WHERE hash = ?", (digest,)).fetchone()
        return None if row is None else (str(row[0]), str(row[1]))


def opened(folder: Path) -> Store:
    """The store of an engine that was started with that folder.

    Raises :class:`EngineRefusedError` where none was, and what :class:`Store` raises.
    """
    if not StateFolder(folder).path.exists():
        raise EngineRefusedError(
            f"{folder} is no engine's state folder.",
            "The server's log names it at the start (`patcher: state in …`).",
        )
    return Store(folder)
