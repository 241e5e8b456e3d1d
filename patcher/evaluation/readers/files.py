"""Reading a file's records: a JSON list, or one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import ForgetSetError
from ...text import encodable
from ...unlearn.facts import MAX_BYTES

Record = Mapping[str, Any]


class WrongShapeError(ValueError):
    """A record lacks a field or has one of the wrong kind; says which, never its text."""


def records(path: str | Path, *, lenient: bool = False) -> Iterator[tuple[int, Record]]:
    """Number (from 1) and record, in the file's order.

    ``lenient``: lines that aren't objects are passed over instead of refused.

    Raises:
        ForgetSetError: unreadable, not UTF-8, not JSON, or not objects.
    """
    text = _text(Path(path))
    if text.lstrip()[:1] == "[":
        yield from _listed(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield number, record
        elif not lenient:
            raise ForgetSetError(
                f"{path}: line {number} is not a JSON object.",
                "Give a JSON list of objects, or one object a line.",
            )


def own_lines(path: str | Path) -> dict[int, dict[str, Any]]:
    """The objects of a JSON Lines file by line number; other lines are passed over."""
    return {number: dict(record) for number, record in records(path, lenient=True)}


def text_of(record: Record, name: str) -> str:
    """The text in that field.

    Raises:
        WrongShapeError: there is none.
    """
    value = record.get(name)
    if not isinstance(value, str):
        raise WrongShapeError(f"{name}: {'missing' if value is None else 'not a text'}")
    if not encodable(value):
        raise WrongShapeError(f"{name}: not valid Unicode")
    return value


def texts_of(record: Record, name: str) -> list[str]:
    """The texts in that list, without empty ones; an absent field is an empty list.

    Raises:
        WrongShapeError: it is no list of texts.
    """
    value = record.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise WrongShapeError(f"{name}: not a list of texts")
    if not all(map(encodable, value)):
        raise WrongShapeError(f"{name}: not valid Unicode")
    return [one for one in value if one.strip()]


def object_of(record: Record, name: str) -> Record:
    """The object in that field.

    Raises:
        WrongShapeError: there is none.
    """
    value = record.get(name)
    if not isinstance(value, Mapping):
        raise WrongShapeError(f"{name}: {'missing' if value is None else 'not an object'}")
    return value


def filled(template: str, subject: str) -> str:
    """The template with the subject in the place of ``{}``.

    Raises:
        WrongShapeError: it has no such place.
    """
    if "{}" not in template:
        raise WrongShapeError("prompt: has no {} for the subject")
    return template.replace("{}", subject)


def question(text: str) -> str:
    """A question as a prompt that an answer continues."""
    return f"Question: {text.strip()}\nAnswer:"


def _listed(path: str | Path, text: str) -> Iterator[tuple[int, Record]]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ForgetSetError(
            f"{path} is not JSON{where}.", "Give the file as it was published."
        ) from None
    for number, record in enumerate(whole, 1):
        if not isinstance(record, dict):
            raise ForgetSetError(
                f"{path}: record {number} is not an object.", "Give a list of objects."
            )
        yield number, record


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ForgetSetError(f"{path} is larger than {MAX_BYTES} bytes.", "Split it.")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ForgetSetError(f"{path} is not UTF-8.", "Save it as UTF-8.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ForgetSetError(f"{path} can't be read: {reason}.", "Give a file of facts.") from None
