"""``patcher log --verify | --at | --head | --expect-head``: questions about the whole ledger."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import read_secret
from patcher.cli.output import clean, facts, note, print_json, short
from patcher.errors import UsageError, VerificationError
from patcher.ledger import stack_at
from patcher.moments import moment, rfc3339
from patcher.protocol import weight_version
from patcher.record import Expected, Proof, head_statement, prove, read_head

if TYPE_CHECKING:
    from datetime import datetime

    from patcher.cli.ledger_source import Source
    from patcher.protocol import LedgerEntry

_LONGEST_HEAD_FILE = 16 << 20  # bytes; a certificate may name many modules
_MOST_SHOWN = 20  # faults; --json has all of them


def examine(source: Source, given: dict[str, Any]) -> None:
    """Prove the ledger, then answer what was asked.

    Raises :class:`~patcher.errors.VerificationError` where it doesn't hold; --verify prints its
    own document then.
    """
    when = moment(given["at"]) if given["at"] else None
    expected = _expected(given["expect_head"]) if given["expect_head"] else None
    if given["head"] or when is not None:
        entries = source.entries()
        proof = prove(entries, expected)
        proof.check()
        if when is None and given["key"]:
            print_json(_signed_head(proof, given["key"], given["password_file"]))
        elif when is None:
            _print_head(proof, given["as_json"])
        else:
            _print_at(entries, when, given["as_json"])
    else:
        _print_proof(*source.prove(expected), expected, given["as_json"])


def _expected(text: str) -> Expected:
    path = Path(text)
    try:
        if path.is_file():
            with path.open("rb") as file:
                text = file.read(_LONGEST_HEAD_FILE).decode()
    except (OSError, ValueError):
        raise UsageError(f"{text[:200]} can't be read.", "Give the file of a head.") from None
    return read_head(text)


def _signed_head(proof: Proof, key: Path, password_file: Path | None) -> dict[str, Any]:
    """The head in a signed envelope, to be kept where the engine's operator can't write."""
    from patcher.signing import enveloped

    password = None if password_file is None else read_secret(password_file, "password")
    return enveloped(head_statement(proof.head), key, password)


def _print_head(proof: Proof, as_json: bool) -> None:
    if as_json:
        print_json(proof.head.as_dict())
    else:
        click.echo(f"{proof.head} {clean(proof.head.time)}")


def _print_at(entries: list[LedgerEntry], when: datetime, as_json: bool) -> None:
    found = stack_at(entries, when)
    made = entries[found.entry - 1] if found.entry else None
    version = weight_version(found.stack)
    if found.ambiguous:
        note("The engine's clock was set back: other stacks were in force at that time too.")
    if as_json:
        entry = made and {name: made[name] for name in ("seq", "time", "event")}
        told = {"at": rfc3339(when), "stack": list(found.stack), "weight_version": version}
        more = {"suspended": found.suspended, "ambiguous": found.ambiguous}
        print_json({**told, "entry": entry, **more})
        return
    nothing = "nothing: the base" + ", by a start without restore" * found.suspended
    rows = [
        ("at", rfc3339(when)),
        ("in force", ", ".join(map(short, reversed(found.stack))) or nothing),
        ("weight version", version),
    ]
    if made is not None:
        rows.append(("since", f"entry {made['seq']}, {made['event']}, {made['time']}"))
    facts(rows)


def _print_proof(proof: Proof, compared: bool, expected: Expected | None, as_json: bool) -> None:
    if as_json:
        _print_document(proof, compared, expected)
    elif not proof.faults:
        in_force = ", ".join(map(short, reversed(proof.state.in_force))) or "nothing: the base"
        facts([("entries", proof.entries), ("head", proof.head), ("in force", in_force)])
        also = " The engine's stack is the one that it gives." if compared else ""
        kept = " The head that was kept is in it." if expected else ""
        click.echo(f"The chain holds, from entry 1 on.{also}{kept}")
    for fault in proof.faults[:_MOST_SHOWN]:
        note(f"error: {clean(fault)}", style="red")
    if proof.faults:
        note(f"{len(proof.faults)} in all: this is not the ledger that the engine wrote.")
        raise click.exceptions.Exit(VerificationError.exit_code)


def _print_document(proof: Proof, compared: bool, expected: Expected | None) -> None:
    whole = proof.head.seq > 0
    print_json(
        {
            "ok": not proof.faults,
            "entries": proof.entries,
            "head": proof.head.as_dict() if whole else None,
            "stack": list(proof.state.in_force) if whole else None,
            "checked": ["chain"] + ["engine"] * compared + ["head"] * bool(expected),
            "faults": [{"entry": one.entry, "what": one.what} for one in proof.faults],
        }
    )
