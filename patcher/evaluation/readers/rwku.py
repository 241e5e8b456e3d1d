"""RWKU: ``forget_level1.json`` … ``neighbor_level2.json`` (Jin et al. 2024, arXiv 2406.10890)."""

from __future__ import annotations

import re
from typing import Any

from .files import Record, question, text_of

BLANK = re.compile(r"_{2,}")


def fits(record: Record) -> bool:
    """Whether the record looks like one."""
    return {"query", "answer", "level"} <= record.keys()


def rows(record: Record) -> list[dict[str, Any]]:
    """One row; ``group`` is the level and the kind of probe, the subject whose fact it is.

    A blank at the end of a cloze is what the answer continues; one with text after it
    is asked for as a question.

    Raises:
        WrongShapeError: a field is missing or of the wrong kind.
    """
    asked, target = text_of(record, "query").strip(), text_of(record, "answer").strip()
    if not asked or not target:
        return []
    kind = record.get("type")
    row = {
        "prompt": _prompt(asked),
        "target": target,
        "group": f"level {record['level']}" + (f": {kind}" if isinstance(kind, str) else ""),
    }
    subject = record.get("neighbor") or record.get("subject")
    # Some probes don't name whom they are about.
    if isinstance(subject, str) and subject.strip() and subject in row["prompt"]:
        row["subject"] = subject
    return [row]


def _prompt(asked: str) -> str:
    blank = BLANK.search(asked)
    if blank is None:
        return question(asked)
    before, after = asked[: blank.start()].rstrip(), asked[blank.end() :]
    if before and not re.search(r"\w", after):
        return before
    return f"Fill in the blank. {question(BLANK.sub('___', asked))}"
