"""CounterFact and MCF: ``counterfact.json``, ``multi_counterfact.json`` (Meng et al. 2022)."""

from __future__ import annotations

from typing import Any

from .files import Record, WrongShapeError, filled, object_of, text_of, texts_of


def fits(record: Record) -> bool:
    """Whether the record looks like one."""
    return isinstance(record.get("requested_rewrite"), dict) and "questions" not in record


def rows(record: Record) -> list[dict[str, Any]]:
    """One row: what is to be forgotten is the true answer, which the neighbours share.

    Raises:
        WrongShapeError: a field is missing or of the wrong kind.
    """
    rewrite = object_of(record, "requested_rewrite")
    row = rewritten(rewrite)
    if row is None:
        return []
    wordings = texts_of(record, "paraphrase_prompts")
    near = neighbours(record, row["target"])
    return [
        row
        | ({"paraphrases": wordings} if wordings else {})
        | ({"neighbours": near} if near else {})
    ]


def rewritten(rewrite: Record) -> dict[str, Any] | None:
    """Prompt, subject, target and relation of a ``requested_rewrite``; None without an answer."""
    subject = text_of(rewrite, "subject")
    prompt = filled(text_of(rewrite, "prompt"), subject)
    target = text_of(object_of(rewrite, "target_true"), "str")
    if not target.strip():
        return None
    row = {"prompt": prompt, "subject": subject, "target": target}
    relation = rewrite.get("relation_id")
    return row | ({"relation": relation} if isinstance(relation, str) else {})


def neighbours(record: Record, target: str) -> list[dict[str, str]]:
    """Neighbouring prompts: texts whose answer is the fact's, or objects that say theirs."""
    found = record.get("neighborhood_prompts") or []
    if not isinstance(found, list):
        raise WrongShapeError("neighborhood_prompts: not a list")
    pairs = []
    for one in found:
        near = {"prompt": one, "target": target} if isinstance(one, str) else one
        if not isinstance(near, dict):
            raise WrongShapeError("neighborhood_prompts: neither texts nor objects")
        pairs.append({"prompt": text_of(near, "prompt"), "target": text_of(near, "target")})
    return [pair for pair in pairs if pair["prompt"].strip() and pair["target"].strip()]
