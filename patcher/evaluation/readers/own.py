"""Fields of own lines that only measuring looks at (docs/evaluation.md, "Formats"), checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...text import encodable
from ...unlearn.facts import unusable


def check_rows(rows: Mapping[int, Mapping[str, Any]]) -> None:
    """See that each row's further fields, where it has them, are of their kinds.

    Raises:
        ForgetSetError: some are not; all of them are named by line and field.
    """
    problems = [
        f"line {number}: {name}: not {kind}"
        for number, row in rows.items()
        for name, (fits, kind) in _FIELDS.items()
        if row.get(name) is not None and not fits(row[name])
    ]
    if problems:
        raise unusable(problems)


def _plain(value: Any) -> bool:
    return isinstance(value, str) and encodable(value)


def _text(value: Any) -> bool:
    return _plain(value) and bool(value.strip())


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_text, value))


def _neighbours(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(one, Mapping) and _text(one.get("prompt")) and _text(one.get("target"))
        for one in value
    )


def _hops(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(one, Mapping)
        and _text(one.get("prompt"))
        and _texts(one.get("targets"))
        and len(one["targets"]) > 0
        for one in value
    )


#: field -> (whether a value is of its kind, the kind in words); a blank name is as none
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "relation": (_plain, "a text"),
    "group": (_plain, "a text"),
    "neighbours": (_neighbours, "a list of objects with prompt and target"),
    "multihop": (_hops, "a list of objects with prompt and a list of targets"),
    "wrong": (_texts, "a list of texts"),
    "restated": (_plain, "a text"),
}
