"""ZsRE as the model-editing papers use it: ``zsre_mend_eval.json`` (Levy et al. 2017)."""

from __future__ import annotations

from typing import Any

from .files import Record, text_of, texts_of


def fits(record: Record) -> bool:
    """Whether the record looks like one."""
    return {"src", "answers", "loc"} <= record.keys()


def rows(record: Record) -> list[dict[str, Any]]:
    """One row: the question and the first of ``answers``; ``pred`` and ``alt`` are not used.

    The neighbour is asked as the file has it, with its ``nq question: `` before it.

    Raises:
        WrongShapeError: a field is missing or of the wrong kind.
    """
    answers = texts_of(record, "answers")
    row: dict[str, Any] = {"prompt": text_of(record, "src"), "subject": text_of(record, "subject")}
    if not answers or not row["prompt"].strip():
        return []
    row["target"] = answers[0]
    if record.get("rephrase"):
        row["rephrase"] = text_of(record, "rephrase")
    near, said = text_of(record, "loc"), text_of(record, "loc_ans")
    if near.strip() and said.strip():
        row["locality"], row["locality_target"] = near, said
    return [{name: value for name, value in row.items() if value.strip()}]
