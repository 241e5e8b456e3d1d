"""``patcher log``: the ledger, filtered, followed, exported or proven."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import (
    address_options,
    existing_file,
    json_option,
    password_option,
    read_token,
)
from patcher.cli.output import clean, note, print_json, short, table
from patcher.errors import EngineUnreachableError, UsageError, VerificationError

if TYPE_CHECKING:
    from patcher.cli.ledger_source import Source
    from patcher.ledger import Filter
    from patcher.protocol import LedgerEntry

POLL = 1.0  # seconds between two looks of --follow
_FILTERS = ("after", "event", "patch", "since", "until")
_WHOLE = ("verify", "at", "head", "expect_head")  # what reads and proves all of the ledger
_FORMS = {".jsonl": "jsonl", ".csv": "csv"}


@click.command()
@click.option(
    "--after", type=click.IntRange(min=0), default=0, help="Only entries after this number."
)
@click.option(
    "--event",
    multiple=True,
    metavar="NAME",
    help="Only entries of that name, or whose name begins so: change-done, change.",
)
@click.option("--patch", metavar="ID", help="Only what was done with this patch.")
@click.option("--since", metavar="TIME", help="Only entries from then on: 2026-11-24T03:00:00Z.")
@click.option("--until", metavar="TIME", help="Only entries before then.")
@click.option("--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option(
    "--export",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="F.jsonl|F.csv",
    help="Write the entries to a file.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(list(_FORMS.values())),
    help="Print the entries in that form.",
)
@click.option(
    "--verify", is_flag=True, help="Prove the chain, and that the engine's stack is the ledger's."
)
@click.option("--at", metavar="TIME", help="Tell the stack that was in force then.")
@click.option("--head", is_flag=True, help="Print the last entry's HASH:SEQ, to be kept elsewhere.")
@click.option(
    "--key", type=existing_file, help="With --head: sign it with this private key, as a document."
)
@password_option
@click.option(
    "--expect-head",
    metavar="FILE|HASH[:SEQ]",
    help="A head that was kept, or a certificate: it must still be in the chain.",
)
@click.option(
    "--file", "path", type=existing_file, metavar="F.jsonl", help="Read an export, no engine."
)
@address_options(required=True)
@json_option
def log(
    engine: str | None, token: str | None, token_file: Path | None, path: Path | None, **given: Any
) -> None:
    """Show who changed the stack, when and to what.

    --verify, --at, --head and --expect-head read the whole ledger and recompute its hashes. Exit
    code 9 if one is off, if a head that was kept is no longer there, or (--verify) if the
    engine's stack is not the one that the ledger gives.
    """
    from patcher.cli.ledger_source import opened

    _check(given, path)
    with opened(path, engine, read_token(token, token_file)) as source:
        if any(given[name] for name in _WHOLE):
            from patcher.cli.proof import examine

            examine(source, given)
        elif given["follow"]:
            _follow(source, given)
        else:
            _show(source, given)


def _check(given: dict[str, Any], path: Path | None) -> None:
    """Refuse options that don't go together."""
    asked = {name for name, value in given.items() if value}
    whole = asked & set(_WHOLE)
    if asked & {"key", "password_file"} and "head" not in asked:
        raise UsageError("--key signs a head.", "Give --head too, or leave it out.")
    if len(whole - {"expect_head"}) > 1:
        raise UsageError("--verify, --at and --head are three questions.", "Ask one at a time.")
    if whole and (others := asked & {*_FILTERS, "follow", "export", "form"}):
        raise UsageError(
            f"--{sorted(whole)[0].replace('_', '-')} is about the whole ledger.",
            f"Leave --{sorted(others)[0].replace('form', 'format')} out.",
        )
    if "follow" in asked and (path or asked & {"export", "as_json"}):
        raise UsageError(
            "--follow prints what comes from an engine.", "For programs: --follow --format jsonl."
        )
    if len(asked & {"export", "form", "as_json"} - ({"as_json"} if given["export"] else set())) > 1:
        raise UsageError("The entries can be told in one form only.", "Choose one.")
    if given["export"] and given["export"].suffix not in _FORMS:
        raise UsageError(f"{given['export']} could be of any format.", "Name it F.jsonl or F.csv.")


def _filter(source: Source, given: dict[str, Any]) -> Filter:
    from patcher.ledger import Filter, named
    from patcher.moments import moment

    since, until = (None if given[n] is None else moment(given[n]) for n in ("since", "until"))
    patch = given["patch"] or ""
    if patch and len(patch) != 64:
        patch = named(source.entries(), patch)
    return Filter(given["event"], patch, since, until)


def _show(source: Source, given: dict[str, Any]) -> None:
    wanted = _filter(source, given)
    entries = [entry for entry in source.entries(given["after"]) if wanted(entry)]
    if given["export"]:
        _export(given["export"], entries, given["as_json"])
    elif given["as_json"]:
        print_json({"entries": entries})
    elif given["form"]:
        _print_as(given["form"], entries)
    elif not entries:
        click.echo("No entries.")
    else:
        table([">#", "time", "event", "what"], [_row(entry) for entry in entries])


def _export(path: Path, entries: list[LedgerEntry], as_json: bool) -> None:
    from patcher.ledger import head_of
    from patcher.ledger_files import text_of
    from patcher.patch import files

    files.write(path, text_of(entries, _FORMS[path.suffix]).encode())
    head = head_of(entries)
    if as_json:
        print_json({"path": str(path), "entries": len(entries), "head": head.as_dict()})
    else:
        click.echo(f"{len(entries)} entries in {path}; the last: {head}")


def _print_as(form: str, entries: list[LedgerEntry], *, header: bool = True) -> None:
    from patcher.ledger_files import text_of

    click.echo(text_of(entries, form, header=header), nl=False)


# -- following ---------------------------------------------------------------------------------


def _follow(source: Source, given: dict[str, Any]) -> None:
    form = given["form"]
    try:
        wanted = _filter(source, given)
        for turn, batch in enumerate(_batches(source, given["after"])):
            entries = [entry for entry in batch if wanted(entry)]
            if form:
                _print_as(form, entries, header=turn == 0)
            for entry in [] if form else entries:
                seq, moment, event, what = map(clean, _row(entry))
                click.echo(f"{seq:>5}  {moment:<24}  {event:<18}  {what}".rstrip())
    except KeyboardInterrupt:  # how this ends
        return


def _batches(source: Source, after: int) -> Iterator[list[LedgerEntry]]:
    """What there is after that number, then what comes, for ever."""
    from patcher.ledger import head_of, verify_chain

    batch = source.entries(after)
    last = batch[-1:]
    yield batch
    while True:
        time.sleep(POLL)
        # The last one again, so that a ledger that was rewritten or put back shows.
        again = _patiently(source, last[0]["seq"] - 1 if last else after)
        if again[: len(last)] != last or verify_chain(again[1:], head_of(again[:1])):
            raise VerificationError(
                "What comes does not follow what was there: the ledger was rewritten.",
                "`patcher log --verify` tells more.",
            )
        batch, last = again[len(last) :], again[-1:]
        yield batch


def _patiently(source: Source, after: int) -> list[LedgerEntry]:
    """The entries after that number, once the engine answers: it may be starting anew."""
    told = False
    while True:
        try:
            return source.entries(after)
        except EngineUnreachableError as error:
            if not told:
                note(f"{error.message} Waiting for it.")
            told = True
        time.sleep(POLL)


# -- for people --------------------------------------------------------------------------------


def _row(entry: LedgerEntry) -> tuple[object, ...]:
    # Digests of weights by module and rank are for programs: a table can't hold them.
    shown = {name: value for name, value in entry["detail"].items() if name != "digests"}
    if guards := shown.get("guards"):
        shown["guards"] = [
            f"{g['guard']}: {g['bound']} {g['value']}" for g in guards if not g["ok"]
        ]
    what = " ".join(f"{name}={_brief(value)}" for name, value in shown.items() if value)
    return entry["seq"], entry["time"], entry["event"], what


def _brief(value: object) -> str:
    if isinstance(value, list):
        return "[" + " ".join(_brief(one) for one in value) + "]"
    if isinstance(value, dict):
        return "{" + " ".join(f"{name}:{_brief(one)}" for name, one in value.items()) + "}"
    text = str(value)
    is_digest = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return short(text) if is_digest else text
