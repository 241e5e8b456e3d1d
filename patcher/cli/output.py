"""What the command prints: JSON for programs, tables for people, plain text in a pipe."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from patcher.errors import PatcherError


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout (what isn't a number is null, never ``NaN``)."""
    click.echo(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    # Python's json would write NaN, which no other reader takes.
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def note(text: str, *, style: str | None = None) -> None:
    """A line on stderr."""
    if style and _colours(sys.stderr):
        text = click.style(text, fg=style)
    click.echo(text, err=True)


def note_error(error: PatcherError) -> None:
    """An error's cause and cure on stderr; a forget set's wrong lines come one a line."""
    note(f"error: {lines(error.message)}", style="red")
    if error.cure:
        note(lines(error.cure))


def lines(text: str) -> str:
    """A text of several lines, each fit to be printed."""
    return "\n".join(map(clean, text.splitlines()))


def facts(rows: Iterable[tuple[str, object]]) -> None:
    """Names and values, one pair a line, on stdout."""
    pairs = [(name, clean(value)) for name, value in rows]
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        label = name.ljust(width)
        click.echo(f"{click.style(label, bold=True) if _colours(sys.stdout) else label}  {value}")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout: drawn by rich on a terminal, aligned columns in a pipe.

    A column whose name begins with ``>`` is aligned to the right.
    """
    names = [name.removeprefix(">") for name in columns]
    right = [name.startswith(">") for name in columns]
    cells = [[clean(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _draw(names, right, cells)
        return
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    for row in [names, *cells]:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        click.echo("  ".join(padded).rstrip())


def _draw(names: Sequence[str], right: Sequence[bool], cells: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name, to_right in zip(names, right, strict=True):
        drawn.add_column(name, justify="right" if to_right else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*map(Text, row))
    Console(no_color=not _colours(sys.stdout)).print(drawn)


def clean(value: object) -> str:
    """``value`` as text that can't steer a terminal.

    Titles come from files that anybody may have made.

    >>> clean("title" + chr(27) + "[31m")
    'title\\\\x1b[31m'
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def short(patch_id: str) -> str:
    """An id as people read it; the first twelve digits name a patch well enough."""
    return patch_id[:12]


def size(count: int) -> str:
    """A number of bytes for people.

    >>> size(1_130_496)
    '1.1 MB'
    """
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def percent(fraction: float | None) -> str:
    """A fraction for people; a dash where there was nothing to measure.

    >>> percent(0.125), percent(None)
    ('12.5 %', '–')
    """
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def _colours(stream: Any) -> bool:
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR")
