"""TOFU and its kin: question and answer, with paraphrases and wrong answers.

Maini et al. 2024, "TOFU: A Task of Fictitious Unlearning for LLMs", arXiv 2401.06121;
the same fields, with a person's ``name``, in arXiv 2410.08109.
"""

from __future__ import annotations

from typing import Any

from .files import Record, WrongShapeError, question, text_of, texts_of


def fits(record: Record) -> bool:
    """Whether the record looks like one."""
    return (
        isinstance(record.get("question"), str)
        and isinstance(record.get("answer"), str)
        and "choices" not in record
    )


def rows(record: Record) -> list[dict[str, Any]]:
    """One row, with the false answers as ``wrong`` and the answer's other wording as ``restated``.

    Raises:
        WrongShapeError: a field is missing or of the wrong kind.
    """
    asked, target = text_of(record, "question").strip(), text_of(record, "answer").strip()
    if not asked or not target:
        return []
    row: dict[str, Any] = {"prompt": question(asked), "target": target}
    if record.get("paraphrased_question"):
        row["rephrase"] = question(text_of(record, "paraphrased_question"))
    if record.get("paraphrased_answer"):
        row["restated"] = text_of(record, "paraphrased_answer")
    wrong = record.get("perturbed_answer")
    if isinstance(wrong, str):
        wrong = [wrong]
    if wrong is not None and not isinstance(wrong, list):
        raise WrongShapeError("perturbed_answer: not a list of texts")
    if wrong:
        row["wrong"] = texts_of({"perturbed_answer": wrong}, "perturbed_answer")
    name = record.get("name")
    if isinstance(name, str) and name.strip() and name in asked:
        row["subject"] = name
    return [row]
