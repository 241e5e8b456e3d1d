"""Facts from the file formats that are published: ``rows_from`` (docs/evaluation.md, "Formats").

Every reader turns a record into plain rows as :func:`patcher.unlearn.facts.read_facts`
takes them, with some further fields that only measuring looks at:

``relation``: what is asked, the same for facts of one kind. ``group``: the part of the
dataset that the row is from. ``neighbours``: a list of ``{"prompt", "target"}`` beside
``locality``. ``multihop``: a list of ``{"prompt", "targets"}``, questions that need the
fact. ``wrong``: a list of false answers. ``restated``: the answer in other words.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import ForgetSetError, UsageError
from ...unlearn.facts import Source, unusable
from . import counterfact, mquake, rwku, tofu, zsre
from .files import Record, WrongShapeError, own_lines, records
from .own import check_rows

Row = dict[str, Any]
logger = logging.getLogger("patcher")

#: format -> (whether a record is of it, the rows that a record gives)
_READERS: dict[str, tuple[Callable[[Record], bool], Callable[[Record], list[Row]]]] = {
    "counterfact": (counterfact.fits, counterfact.rows),
    "zsre": (zsre.fits, zsre.rows),
    "mquake": (mquake.fits, mquake.rows),
    "rwku": (rwku.fits, rwku.rows),
    "tofu": (tofu.fits, tofu.rows),
}
FORMATS = ("auto", "jsonl", *_READERS)


def rows_from(
    path: str | Path,
    format: str = "auto",  # noqa: A002 - the command's word
    limit: int | None = None,
) -> list[Row]:
    """The rows of a file of facts, whatever its format.

    Args:
        path: a file of one of :data:`FORMATS`.
        format: which; ``auto`` recognises it by its fields.
        limit: stop after that many rows.

    Returns:
        Rows for ``read_facts``; the same prompt and target comes once (what a later
        record adds is joined to the first). A record with an empty answer is left out.

    Raises:
        ForgetSetError: unreadable, of no known or of several formats, or a record has
            the wrong shape (all of them are named, by number).
        UsageError: an unknown format.
    """
    found = format_of(path, format)
    if found == "jsonl":
        return list(own_lines(path).values())[:limit]
    make = _READERS[found][1]
    rows: dict[str, Row] = {}
    problems: list[str] = []
    empty = 0
    for number, record in records(path):
        if limit is not None and len(rows) >= limit:
            break
        try:
            made = make(record)
        except WrongShapeError as error:
            problems.append(f"record {number}: {error}")
            continue
        empty += not made
        for row in made:
            _join(rows, row)
    if problems:
        raise unusable(problems)
    if not rows:
        raise ForgetSetError(f"{path} has no fact with an answer.", "Give another file.")
    if empty:
        logger.warning("%d records with an empty answer are left out", empty)
    return list(rows.values())[:limit]


def format_of(path: str | Path, format: str = "auto") -> str:  # noqa: A002
    """The format that is meant, or that the file's records show.

    Raises:
        ForgetSetError: no format, or more than one, fits the first record.
        UsageError: an unknown format.
    """
    if format not in FORMATS:
        raise UsageError(f"Unknown format {format!r}.", f"Choose {', '.join(FORMATS)}.")
    if format != "auto":
        return format
    first = next((record for _, record in records(path, lenient=True)), None)
    # Lines that say prompt and target themselves are the project's own.
    if first is None or "target" in first or "messages" in first:
        return "jsonl"
    fitting = [name for name, (fits, _) in _READERS.items() if fits(first)]
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(FORMATS[1:])
    if fitting:
        raise ForgetSetError(
            f"{path} could be {' or '.join(fitting)}.", "Say which with the format option."
        )
    if "prompt" in first:
        return "jsonl"  # its reader says what is missing, line by line
    raise ForgetSetError(f"{path} is of no known format ({known}).", "See docs/evaluation.md.")


def _join(rows: dict[str, Row], row: Row) -> None:
    # MQuAKE has the same edit in many cases; a fact is asked once.
    key = json.dumps([row["prompt"], row["target"]])
    first = rows.setdefault(key, row)
    if first is row:
        return
    for name in ("paraphrases", "neighbours", "multihop"):
        more = [one for one in row.get(name, ()) if one not in first.get(name, ())]
        if more:
            first[name] = [*first.get(name, ()), *more]


def opened(source: Source, format: str = "auto") -> tuple[Source, dict[int, Row]]:  # noqa: A002
    """What ``read_facts`` is to read, and each line's row with the fields that facts don't keep.

    Raises:
        ForgetSetError, UsageError: as :func:`rows_from`; and such a field is of another kind.
    """
    if not isinstance(source, str | Path):
        if format not in FORMATS:
            raise UsageError(f"Unknown format {format!r}.", f"Choose {', '.join(FORMATS)}.")
        own = {n: dict(row) for n, row in enumerate(source, 1) if isinstance(row, Mapping)}
        check_rows(own)
        return source, own
    if format_of(source, format) == "jsonl":
        own = own_lines(source)
        check_rows(own)
        return source, own
    rows = rows_from(source, format)
    return rows, dict(enumerate(rows, 1))
