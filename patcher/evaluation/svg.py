"""Plots as inline SVG: points in a plane, and bars. No script, no font, no address."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 48
BAR = 22  # height of a bar and its gap


@dataclass(frozen=True)
class Point:
    """A mark at ``(x, y)``; ``kind`` is its CSS class, ``label`` shows on hovering.

    ``x_span``, ``y_span``: an interval as a line through it. ``name`` stands beside it.
    """

    x: float
    y: float
    kind: str
    label: str
    name: str = ""
    x_span: tuple[float, float] | None = None
    y_span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bar:
    """One bar from zero to ``value``; ``span``: its interval."""

    name: str
    value: float
    label: str
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Axis:
    """What runs along it, from where to where; ``whole``: in steps of whole numbers."""

    title: str
    low: float
    high: float
    whole: bool = False

    def place(self, value: float, start: float, stop: float) -> float:
        """Where ``value`` lies between two pixels; what is outside lies at the edge."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return start + share * (stop - start)

    def ticks(self) -> list[float]:
        """Four to eight round values."""
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        for factor in (1, 2, 5, 10):
            if (self.high - self.low) / (step * factor) <= 7:
                step *= factor
                break
        step = max(step, 1.0) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 10) + 0.0 for i in range(first, last + 1)]


def axis(title: str, values: Sequence[float], *, zero: bool = False, whole: bool = False) -> Axis:
    """An axis that holds all of the values, with a little room."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(title, low if zero and low == 0 else low - room, high + room, whole)


@dataclass(frozen=True)
class Track:
    """A line through ``(x, y)`` in their order; ``name`` stands in the legend, if any."""

    name: str
    kind: str
    places: Sequence[tuple[float, float]] = ()


def plane(
    x: Axis,
    y: Axis,
    points: Sequence[Point],
    *,
    diagonal: bool = False,
    tracks: Sequence[Track] = (),
) -> str:
    """A scatter plot with lines; ``diagonal``: the line where both are equal."""
    parts = _frame(x, y)
    for track in tracks:
        if len(track.places) > 1:
            line = " ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in track.places)
            kind = escape(track.kind, quote=True)
            parts.append(f'<polyline class="track {kind}" points="{line}"/>')
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        if low < high:
            parts.append(_line(_x(x, low), _y(y, low), _x(x, high), _y(y, high), "guide"))
    for point in points:
        across, up = _x(x, point.x), _y(y, point.y)
        kind = escape(point.kind, quote=True)
        if point.x_span:
            parts.append(
                _line(_x(x, point.x_span[0]), up, _x(x, point.x_span[1]), up, f"span {kind}")
            )
        if point.y_span:
            parts.append(
                _line(
                    across, _y(y, point.y_span[0]), across, _y(y, point.y_span[1]), f"span {kind}"
                )
            )
        parts.append(
            f'<circle class="{kind}" cx="{across:.1f}" cy="{up:.1f}" r="4">'
            f"<title>{escape(point.label)}</title></circle>"
        )
        if point.name:
            beside = across < WIDTH - 110
            parts.append(
                _text(
                    across + (8 if beside else -8), up - 8, point.name, "start" if beside else "end"
                )
            )
    named = [track for track in tracks if track.name]
    for row, track in enumerate(named):
        at = HEIGHT + BAR * (row // 2) + 8
        left = LEFT + (WIDTH - LEFT) / 2 * (row % 2)
        kind = escape(track.kind, quote=True)
        parts.append(f'<circle class="{kind}" cx="{left:.1f}" cy="{at}" r="5"/>')
        parts.append(_text(left + 12, at + 4, track.name, "start"))
    height = HEIGHT + BAR * math.ceil(len(named) / 2)
    return _svg(WIDTH, height, f"{y.title} against {x.title}", parts)


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars with their names to the left."""
    values = [one for row in rows for one in (row.value, *(row.span or ()))]
    scale = axis(title, values, zero=True)
    wide, height = 190, TOP + BAR * len(rows) + BOTTOM
    bottom = height - BOTTOM
    parts = []
    for tick in scale.ticks():
        at = scale.place(tick, wide, WIDTH - RIGHT)
        parts += [_line(at, TOP, at, bottom, "grid"), _text(at, bottom + 16, f"{tick:g}", "middle")]
    for number, row in enumerate(rows):
        middle = TOP + BAR * (number + 0.5)
        start, stop = (scale.place(v, wide, WIDTH - RIGHT) for v in (0.0, row.value))
        name = row.name if len(row.name) <= 28 else f"…{row.name[-27:]}"
        parts.append(_text(wide - 8, middle + 4, name, "end"))
        parts.append(
            f'<rect class="patched" x="{min(start, stop):.1f}" y="{middle - 7:.1f}" '
            f'width="{abs(stop - start):.1f}" height="14">'
            f"<title>{escape(f'{row.name}: {row.label}')}</title></rect>"
        )
        if row.span:
            a, b = (scale.place(v, wide, WIDTH - RIGHT) for v in row.span)
            parts.append(_line(a, middle, b, middle, "span"))
    parts.append(_text((wide + WIDTH - RIGHT) / 2, height - 8, title, "middle"))
    return _svg(WIDTH, height, title, parts)


def _frame(x: Axis, y: Axis) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in x.ticks():
        at = _x(x, tick)
        parts += [_line(at, TOP, at, bottom, "grid"), _text(at, bottom + 16, f"{tick:g}", "middle")]
    for tick in y.ticks():
        at = _y(y, tick)
        parts += [_line(LEFT, at, right, at, "grid"), _text(LEFT - 6, at + 4, f"{tick:g}", "end")]
    middle = (TOP + bottom) / 2
    parts.append(_text((LEFT + right) / 2, HEIGHT - 10, x.title, "middle"))
    parts.append(
        f'<text x="14" y="{middle:.1f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle:.1f})">{escape(y.title)}</text>'
    )
    return parts


def _x(scale: Axis, value: float) -> float:
    return scale.place(value, LEFT, WIDTH - RIGHT)


def _y(scale: Axis, value: float) -> float:
    return scale.place(value, HEIGHT - BOTTOM, TOP)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )
