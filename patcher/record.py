"""The ledger as evidence: all of it proven, against a head kept elsewhere and a running engine."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patcher.errors import UsageError, VerificationError
from patcher.ledger import (
    Fault,
    Head,
    State,
    disagreement,
    head_of,
    missing_head,
    replay,
    verify_chain,
)
from patcher.protocol import STATEMENT

if TYPE_CHECKING:
    from patcher.client import Engine
    from patcher.protocol import LedgerEntry, Status

Expected = tuple[str, int | None]  # an earlier head's hash, and its number where known


@dataclass(frozen=True)
class Proof:
    """What came of proving a whole ledger; ``state``: what it tells at its end."""

    entries: int
    head: Head
    state: State
    faults: list[Fault]

    def check(self) -> None:
        """Raise :class:`~patcher.errors.VerificationError` where something is wrong."""
        if self.faults:
            more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
            raise VerificationError(
                f"The ledger does not hold: {self.faults[0]}{more}.",
                "`patcher log --verify` lists all of it. Compare with an export or a backup of "
                "the state folder.",
            )


def prove(
    entries: Sequence[LedgerEntry],
    expected: Expected | None = None,
    served: tuple[Sequence[str], int] | None = None,
) -> Proof:
    """Check the chain from entry 1, that no entry contradicts others, and what else is known.

    ``expected``: an earlier head. ``served``: an engine's
    stack, and how many entries there were before it was asked for.
    """
    faults = verify_chain(entries) or replay(entries)[1]
    if not entries:
        faults = [Fault(0, "there is no entry, so nothing is proven")]
    if expected is not None:
        faults = faults + missing_head(entries, *expected)
    if faults:  # what a broken ledger tells of the stack is worth nothing
        return Proof(len(entries), Head(), State(), faults)
    states, _ = replay(entries)
    if served is not None:
        faults = disagreement(states, *served)
    return Proof(len(entries), head_of(entries), states[-1], faults)


def head_statement(head: Head) -> dict[str, Any]:
    """A head as an in-toto statement, to be signed and kept elsewhere."""
    return {
        "_type": STATEMENT,
        "subject": [{"name": "ledger head", "digest": {"sha256": head.hash}}],
        "predicateType": "urn:patcher:head:v1",
        "predicate": {"ledger": {"head": head.as_dict()}},
    }


_HEAD = re.compile(r"([0-9a-f]{64})(?::(\d{1,15}))?", re.ASCII)


def read_head(text: str) -> Expected:
    """The hash and number of a head: ``HASH``, ``HASH:SEQ …``, its JSON, or a certificate's.

    Of a signed one the signature isn't looked at: ``patcher verify-file`` does that.

    Raises :class:`~patcher.errors.UsageError` where there is none.
    """
    words = text.split()
    if words and (match := _HEAD.fullmatch(words[0])):
        return match[1], None if match[2] is None else int(match[2])
    try:
        value = json.loads(text)
        if "payload" in value:
            value = json.loads(b64decode(value["payload"]))
        if "predicate" in value:
            value = value["predicate"]["ledger"]
        value = value.get("head", value)
        match = _HEAD.fullmatch(f"{value['hash']}:{value['seq']}")
        assert match is not None
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError):
        raise UsageError(
            "That is no head of a ledger.",
            "Give HASH, HASH:SEQ, or a file that `patcher log --head` or `patcher certificate` "
            "wrote.",
        ) from None
    return match[1], int(match[2])


def proven(
    engine: Engine, expected: Expected | None = None
) -> tuple[Proof, list[LedgerEntry], Status]:
    """Prove an engine's whole ledger, and that the stack it serves is the ledger's.

    ``expected``: an earlier head. Others may change the stack meanwhile. Raises what the client
    raises; what is wrong is in the proof.
    """
    entries = engine.ledger()
    known = len(entries)
    status = engine.status()
    entries += engine.ledger(after=known)
    return prove(entries, expected, (status["stack"], known)), entries, status
