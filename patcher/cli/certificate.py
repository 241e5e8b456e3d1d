"""``patcher certificate``: evidence that what was asked to be removed is removed here, now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import (
    engine_options,
    existing_file,
    json_option,
    output_option,
    password_option,
    read_secret,
)
from patcher.cli.output import facts, print_json

if TYPE_CHECKING:
    from patcher.client import Engine


@click.command()
@click.option(
    "--patch", "patch_id", required=True, metavar="ID", help="A patch in force; may be shortened."
)
@click.option(
    "--commitment-of",
    "forget",
    type=existing_file,
    metavar="FORGET.jsonl",
    help="Check that the patch commits to these requests, under the owner's salt.",
)
@output_option("Where to write the statement.", "CERT.json")
@click.option(
    "--key", type=existing_file, help="Sign it with this private key; the file is an envelope then."
)
@password_option
@engine_options
@json_option
def certificate(
    engine: Engine,
    patch_id: str,
    forget: Path | None,
    output: Path,
    key: Path | None,
    password_file: Path | None,
    as_json: bool,
) -> None:
    """State what an engine serves, as evidence for a removal request.

    An in-toto statement: the patch, the commitment to the requests, the live weights as read
    now, the figures of the patch, its entry in the ledger and the ledger's head. Refused where
    the patch isn't in force (exit code 6), or weights or ledger aren't what they must be (9).
    With --key it is signed, in a DSSE envelope; `patcher verify-file` checks that.
    """
    from patcher.certificate import certify
    from patcher.patch import files

    password = None if password_file is None else read_secret(password_file, "password")
    statement = certify(engine, patch_id, forget)
    document = statement
    if key is not None:
        from patcher.signing import enveloped

        document = enveloped(statement, key, password)
    files.write(output, json.dumps(document, indent=2, allow_nan=False).encode() + b"\n")
    if as_json:
        print_json({"path": str(output), "signed": key is not None, "statement": statement})
    else:
        _print(output, statement, "not signed" if key is None else f"signed with {key.name}")


def _print(output: Path, statement: dict[str, Any], signed: str) -> None:
    told = statement["predicate"]
    requests, head = told["requests"], told["ledger"]["head"]
    checked = "these requests" if requests["commitmentChecked"] else "commitment not checked"
    facts(
        [
            ("certificate", f"{output}, {signed}"),
            ("patch", told["patch"]["id"]),
            ("requests", f"{requests['count']}, {checked}"),
            ("in force since", told["inForce"]["withoutBreakSince"]),
            ("weight version", told["inForce"]["weightVersion"]),
            ("live weights", f"{len(told['weights'])} rank(s) read, as must be"),
            (
                "ledger",
                f"entry {told['ledger']['entry']['seq']}, head {head['hash']}:{head['seq']}",
            ),
        ]
    )
    click.echo("\nWhat it does not prove stands in it, under `doesNotProve`.")
