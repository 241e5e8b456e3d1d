"""The signatures of stored patches: the table in the store, and whether they are enough."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher.errors import EngineRefusedError, InvalidPatchError, TrustError
from patcher.patch import Patch
from patcher.signing import TrustPolicy, bundle_subject, normalised
from patcher.text import shown

if TYPE_CHECKING:
    from patcher.engine.store import Store

MAX_SIGNATURES = 64  # of one patch
TABLE = """
CREATE TABLE IF NOT EXISTS signatures (
  patch TEXT NOT NULL REFERENCES patches, digest TEXT NOT NULL, signer TEXT,
  stored TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (patch, digest)) STRICT;
"""


def read(db: sqlite3.Connection, patch_id: str) -> list[bytes]:
    """The bundles of a patch, the oldest first."""
    rows = db.execute(
        "SELECT data FROM signatures WHERE patch = ? ORDER BY stored, digest", (patch_id,)
    ).fetchall()
    return [bytes(row[0]) for row in rows]


def add(
    db: sqlite3.Connection, patch_id: str, bundle: bytes, signer: str | None, moment: str
) -> str | None:
    """Keep a bundle; its SHA-256, or None where it was there.

    Those of known signers and those of others are counted apart: strangers can't push them out.

    Raises :class:`EngineRefusedError` where the patch has as many as are kept.
    """
    digest = hashlib.sha256(bundle).hexdigest()
    row = (patch_id, digest, signer, moment, bundle)
    if not db.execute("INSERT OR IGNORE INTO signatures VALUES (?, ?, ?, ?, ?)", row).rowcount:
        return None
    query = "SELECT count(*) FROM signatures WHERE patch = ? AND (signer IS NULL) = ?"
    (count,) = db.execute(query, (patch_id, signer is None)).fetchone()
    if count > MAX_SIGNATURES:
        raise EngineRefusedError(
            f"Patch {patch_id[:16]} has {MAX_SIGNATURES} signatures, the most that are kept.",
            "Sign the patch only with keys that the engine's trust policy names.",
        )
    return digest


class Trust:
    """Whether patches may be in force by the operator's policy; without one all may."""

    def __init__(self, store: Store, path: Path | None) -> None:
        self.store = store
        self.policy = None if path is None else TrustPolicy.read(path)

    def told(self) -> dict[str, Any] | None:
        """What `status` and the ledger tell of the policy."""
        if self.policy is None:
            return None
        file = self.policy.file
        return {
            "policy": self.policy.digest,
            "signatures": file.signatures,
            "unsigned": file.unsigned,
            "signers": [one.table.name for one in self.policy.signers],
        }

    def add(self, patch_id: str, bundle: bytes, actor: str) -> tuple[bool, str | None]:
        """Store a bundle; whether it is new, and which of the policy's signers made it.

        Under a policy those of others aren't kept: nothing would ever come of them.

        Raises :class:`InvalidPatchError` for what is no bundle of this patch, and
        :class:`UnknownPatchError` where the patch isn't stored.
        """
        if bundle_subject(bundle) != patch_id:
            raise InvalidPatchError(
                f"That is no signature of patch {shown(patch_id)}.",
                "Send a bundle that `patcher sign` made for this very file.",
            )
        patch = Patch.from_bytes(self.store.patch_bytes(patch_id))
        signer = None if self.policy is None else self.policy.signer_of(patch, bundle)
        name = None if signer is None else signer.table.name
        if self.policy is not None and name is None:
            return False, None
        return self.store.add_signature(patch_id, normalised(bundle), actor, name), name

    def check(self, ids: Iterable[str]) -> dict[str, list[str]]:
        """Who signed each of the stored patches ``ids``; nothing without a policy.

        Raises :class:`TrustError` where one may not be in force.
        """
        signers: dict[str, list[str]] = {}
        for patch_id in ids if self.policy is not None else ():
            signers |= self.check_one(Patch.from_bytes(self.store.patch_bytes(patch_id)))
        return signers

    def check_one(self, patch: Patch, more: Sequence[bytes] = ()) -> dict[str, list[str]]:
        """The same for a patch that needn't be stored; ``more``: signatures that came with it."""
        if self.policy is None:
            return {}
        given = dict.fromkeys([*self.store.signatures(patch.id), *more[:MAX_SIGNATURES]])
        return {patch.id: self.policy.check(patch, list(given))}

    def check_restored(self, ids: Iterable[str]) -> None:
        """The same at a start, which then ends without serving."""
        try:
            self.check(ids)
        except TrustError as error:
            cure = f"{error.cure} Or start with --no-restore, which leaves the stack out."
            raise TrustError(error.message, cure, **error.details) from None
