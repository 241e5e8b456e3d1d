"""Evidence for a removal request: what an engine serves, as an in-toto Statement.

``Statement v1``: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md. What is
in the predicate is in ``docs/protocol.md``, "Certificate". It isn't signed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from patcher.errors import (
    EngineRefusedError,
    ForgetSetError,
    StackChangedError,
    VerificationError,
)
from patcher.ledger import Head, head_of, in_force_since, put_on
from patcher.moments import now
from patcher.protocol import STATEMENT
from patcher.record import proven

if TYPE_CHECKING:
    from patcher.client import Engine
    from patcher.patch import Manifest, Patch
    from patcher.protocol import LedgerEntry, Status, Verification

PREDICATE = "urn:patcher:removal:v1"
DOES_NOT_PROVE = (
    "It does not prove that the model no longer knows the facts: it was edited so that it stops "
    "giving them, and other wordings, fine-tuning or attacks may bring them back.",
    "It does not prove that the evaluation figures are right: they are what the maker of the "
    "patch measured and wrote into its manifest, on the prompts that they chose.",
    "It does not prove anything about other engines, copies of the weights, backups, training "
    "data, logs, caches outside this engine, or answers that were given before.",
    "It does not prove that the patch is in force at any other time than the one stated.",
    "It does not prove what the engine's own programs say of themselves: whoever can replace "
    "them, or the state folder, can make a statement like this one.",
    "It does not prove who made it until it is signed, nor when, until somebody else dates it.",
)


@dataclass(frozen=True)
class Evidence:
    """All that an engine told, taken while its stack stayed the same."""

    patch: Patch
    status: Status
    live: Verification
    entries: Sequence[LedgerEntry]
    time: str


def certify(
    engine: Engine, patch_id: str, forget: str | PathLike[str] | None = None
) -> dict[str, Any]:
    """A statement that a patch is in force, and that the live weights are what it makes them.

    ``patch_id`` may be shortened to what is unambiguous in the stack. ``forget``: the forget set
    that the patch must commit to under the owner's salt.

    Raises
    ------
    UnknownPatchError, AmbiguousIdError
        The patch isn't in force.
    VerificationError
        Live weights, the ledger's chain or the patch's own bytes are not what they must be.
    ForgetSetError
        The forget set is another than the one that the patch was computed from.
    StackChangedError
        Somebody changed the stack meanwhile.
    EngineRefusedError
        The engine is in the midst of a change, or has no record of this patch.

    """
    from patcher.given import resolve

    (whole,) = resolve([patch_id], engine.status()["stack"])
    patch = engine.download(whole)
    if patch.id != whole:
        raise VerificationError(
            f"The engine gave another file than the patch {whole[:12]}.",
            "Look at the engine's state folder.",
        )
    checked = forget is not None and _check_commitment(patch.manifest, forget)
    live = engine.verify()
    proof, entries, status = proven(engine)
    proof.check()
    _check_engine(whole, status, live, patch)
    return statement(Evidence(patch, status, live, entries, now()), checked=checked)


def statement(found: Evidence, *, checked: bool) -> dict[str, Any]:
    """The in-toto statement; ``checked``: the commitment was recomputed from a forget set."""
    manifest, head = found.patch.manifest, head_of(found.entries)
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": f"{found.patch.id[:12]}.st", "digest": {"sha256": found.patch.id}},
            {"name": "ledger head", "digest": {"sha256": head.hash}},
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "time": found.time,
            "requests": {
                "count": manifest.requests.count,
                "commitment": manifest.requests.commitment,
                "commitmentChecked": checked,
            },
            "patch": {**_patch(found.patch), "signers": _signers(found)},
            "model": {
                "name": manifest.base.model,
                "architecture": manifest.base.architecture,
                "served": found.status["engine"]["model"],
                "base": {name: one.digest for name, one in manifest.base.modules.items()},
            },
            "inForce": _in_force(found),
            "weights": [_rank(rank, manifest) for rank in found.live["ranks"]],
            "evaluation": manifest.evaluation,
            "ledger": {"entry": _entry(found), "head": head.as_dict()},
            "engine": {
                name: found.status["engine"].get(name) for name in ("vllm", "patcher", "platform")
            },
            "doesNotProve": list(DOES_NOT_PROVE),
        },
    }


def _patch(patch: Patch) -> dict[str, Any]:
    manifest = patch.manifest
    told = {"id": patch.id, "bytes": len(patch.data), "title": manifest.title}
    made = {"created": manifest.created, "tool": manifest.tool, "method": manifest.method.name}
    return {**told, **made, "requires": list(manifest.requires)}


def _in_force(found: Evidence) -> dict[str, Any]:
    (one,) = (p for p in found.status["patches"] if p["id"] == found.patch.id)
    unbroken = in_force_since(found.entries, found.patch.id)
    return {
        "since": one["since"],
        "withoutBreakSince": unbroken and unbroken["time"],
        "expires": one.get("expires"),
        "stack": found.status["stack"],
        "weightVersion": found.status["weight_version"],
    }


def _rank(rank: Any, manifest: Manifest) -> dict[str, Any]:
    modules = {
        name: one["digest"]
        for name, one in rank["modules"].items()
        if name in manifest.base.modules
    }
    return {"engine": rank["engine"], "rank": rank["rank"], "modules": modules}


def _put_on(found: Evidence) -> LedgerEntry:
    entry = put_on(found.entries, found.patch.id)
    if entry is None:
        raise EngineRefusedError(
            f"No entry of the ledger put the patch {found.patch.id[:12]} on.",
            "`patcher log --verify` looks closer.",
        )
    return entry


def _signers(found: Evidence) -> list[str]:
    """Whose signatures the engine's policy counted when it took the patch; none without one."""
    signers = _put_on(found)["detail"].get("signers", {})
    return list(signers.get(found.patch.id, []))


def _entry(found: Evidence) -> dict[str, Any]:
    entry = _put_on(found)
    told = {name: entry["detail"].get(name, "") for name in ("change", "actor", "reason")}
    return {**Head(entry["seq"], entry["hash"], entry["time"]).as_dict(), **told}


def _check_engine(patch_id: str, status: Status, live: Verification, patch: Patch) -> None:
    if patch_id not in status["stack"] or live["weight_version"] != status["weight_version"]:
        raise StackChangedError(
            "Somebody changed the stack while it was certified.", "Look at it, and ask again."
        )
    if status["engine"]["state"] != "ready":
        raise EngineRefusedError("The engine is in the midst of a change.", "Ask again.")
    wrong = [name for name in patch.manifest.base.modules if not _as_must_be(name, live)]
    wrong = wrong or [name for name, ok in live["modules"].items() if not ok]
    if wrong or not live["ok"]:
        named = ", ".join(wrong[:3]) or "a rank has another stack"
        raise VerificationError(
            f"The live weights are not what base and stack must give: {named}.",
            "`patcher verify` tells more, `patcher verify --heal` puts right what a reload did.",
            modules=wrong,
        )


def _as_must_be(name: str, live: Verification) -> bool:
    """Whether a rank at least read that module, and each that did found it right."""
    read = [rank["modules"][name] for rank in live["ranks"] if name in rank["modules"]]
    return bool(read) and all(one["ok"] for one in read)


def _check_commitment(manifest: Manifest, forget: str | PathLike[str]) -> bool:
    from pathlib import Path

    from patcher.patch import commitment, owner_salt
    from patcher.unlearn.facts import read_facts

    facts = read_facts(Path(forget))
    committed = commitment([fact.canonical() for fact in facts], owner_salt(make=False))
    if committed == manifest.requests.commitment:
        return True
    count = manifest.requests.count
    raise ForgetSetError(
        f"The patch commits to another forget set, of {count} requests; {len(facts)} are here.",
        "Give the very requests that it was computed from, in their order, and the salt of then "
        "(PATCHER_SALT_FILE).",
    )
