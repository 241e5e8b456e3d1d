"""The ledger as text: JSON Lines, which can be read back and verified, and CSV. No I/O."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from typing import Any

from patcher.ledger import Fault, detail_text, misshapen
from patcher.protocol import LedgerEntry

FORMATS = ("jsonl", "csv")
MAX_LINE = 64 << 20  # bytes
_TOLD = ("change", "actor", "client", "reason", "outcome")  # of a detail, in columns of their own
_LISTS = ("before", "after")
COLUMNS = ("seq", "time", "event", *_TOLD, *_LISTS, "detail", "previous", "hash")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute


def jsonl(entries: Iterable[LedgerEntry]) -> str:
    """One JSON object a line, with all that the hashes cover."""
    return "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)


def csv_text(entries: Iterable[LedgerEntry], *, header: bool = True) -> str:
    """A row an entry (RFC 4180); ``detail`` is the text that its hash covers.

    In the other columns a text that a spreadsheet would compute begins with an apostrophe.
    """
    text = io.StringIO()
    rows = csv.writer(text)
    if header:
        rows.writerow(COLUMNS)
    rows.writerows(map(_row, entries))
    return text.getvalue()


def _row(entry: LedgerEntry) -> list[object]:
    detail = entry["detail"]
    told = [_harmless(str(detail.get(name, ""))) for name in _TOLD]
    lists = [_harmless(" ".join(map(str, detail.get(name) or ()))) for name in _LISTS]
    covered = [detail_text(detail), entry["previous"], entry["hash"]]
    names = [_harmless(entry["time"]), _harmless(entry["event"])]
    return [entry["seq"], *names, *told, *lists, *covered]


def _harmless(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


def text_of(entries: Iterable[LedgerEntry], form: str, *, header: bool = True) -> str:
    """The entries as one of :data:`FORMATS`; ``header``: with CSV's."""
    return jsonl(entries) if form == "jsonl" else csv_text(entries, header=header)


def parse(lines: Iterable[bytes]) -> tuple[list[LedgerEntry], list[Fault]]:
    """The entries of a JSON Lines file, and which lines are none. The file may be anybody's."""
    entries: list[LedgerEntry] = []
    faults: list[Fault] = []
    empty = 0  # the number of an empty line, which may only be the last
    for number, line in enumerate(lines, 1):
        if empty:
            faults.append(Fault(0, f"line {empty}: it is empty"))
            empty = 0
        if not line.strip():
            empty = number
            continue
        try:
            if len(line) > MAX_LINE:
                raise ValueError("too long")
            entry = json.loads(
                line.decode(), object_pairs_hook=_unique, parse_constant=_no_constant
            )
            # No infinity, and no half of a surrogate pair.
            json.dumps(entry, ensure_ascii=False, allow_nan=False).encode()
            wrong = misshapen(entry)
        except (ValueError, RecursionError):
            wrong = "it is no JSON that means one thing only"
        if wrong:
            faults.append(Fault(0, f"line {number}: {wrong}"))
        else:
            entries.append(entry)
    return entries, faults


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name twice")
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
