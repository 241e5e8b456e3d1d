"""MQuAKE: ``MQuAKE-CF.json``, ``MQuAKE-CF-3k.json``, ``MQuAKE-T.json`` (Zhong et al. 2023)."""

from __future__ import annotations

from typing import Any

from . import counterfact
from .files import Record, WrongShapeError, question, text_of, texts_of


def fits(record: Record) -> bool:
    """Whether the record looks like one."""
    return isinstance(record.get("requested_rewrite"), list) and "questions" in record


def rows(record: Record) -> list[dict[str, Any]]:
    """One row a rewrite, each with the case's multi-hop questions and their old answers.

    A rewrite's ``question`` is its paraphrase. The answer that counts is the one that
    was true before the edit, or an alias of it.

    Raises:
        WrongShapeError: a field is missing or of the wrong kind.
    """
    rewrites = record.get("requested_rewrite")
    if not isinstance(rewrites, list) or not all(isinstance(one, dict) for one in rewrites):
        raise WrongShapeError("requested_rewrite: not a list of objects")
    answers = [text_of(record, "answer"), *texts_of(record, "answer_alias")]
    answers = [answer for answer in answers if answer.strip()]
    hops = [
        {"prompt": question(asked), "targets": answers} for asked in texts_of(record, "questions")
    ]
    found = []
    for rewrite in rewrites:
        row = counterfact.rewritten(rewrite)
        if row is None:
            continue
        if rewrite.get("question"):
            row["paraphrases"] = [question(text_of(rewrite, "question"))]
        found.append(row | ({"multihop": hops} if hops and answers else {}))
    return found
