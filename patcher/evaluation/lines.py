"""An evaluation's document as lines of a table: one line a figure, base and patched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

USUAL = ("efficacy", "generalization", "specificity", "retained")

Value = Mapping[str, Any] | float | int | None


class Line(NamedTuple):
    """``probe``: where it is from; ``name``: which of its figures. Values are shares or numbers."""

    probe: str
    name: str
    base: Value
    patched: Value


def is_share(value: object) -> bool:
    """Whether the value is a share: ``yes`` of ``of``, with its interval."""
    return isinstance(value, Mapping) and {"yes", "of", "interval"} <= value.keys()


def usual_lines(document: Mapping[str, Any]) -> list[Line]:
    """The four fractions, as shares, and the perplexity."""
    sides = ("base", "patched")
    lines = []
    for name in USUAL:
        shares = [
            {
                **document["counts"][side][name],
                "share": document[side][name],
                "interval": document["intervals"].get(side, {}).get(name),
            }
            for side in sides
        ]
        lines.append(Line(name, "", shares[0], shares[1]))
    return [*lines, Line("perplexity", "", *(document[side]["perplexity"] for side in sides))]


def probe_lines(document: Mapping[str, Any]) -> list[Line]:
    """Every further share and number; lists (of single facts, of steps) are left out."""
    return [
        Line(probe, name, base, _at(found["patched"], name))
        for probe, found in document["probes"].items()
        if "base" in found
        for name, base in _leaves(found["base"], "")
    ]


def _leaves(found: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Value]]:
    for name, value in found.items():
        if is_share(value) or value is None or isinstance(value, int | float):
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")


def _at(found: Mapping[str, Any], path: str) -> Value:
    value: Any = found
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping | int | float) else None
