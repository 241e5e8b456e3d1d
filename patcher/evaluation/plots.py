"""The page's plots, from evaluations' documents; None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from .svg import Axis, Bar, Point, Track, axis, bars, plane

Document = Mapping[str, Any]
MOST = 40  # bars in one plot
COLOURS = 8  # after which they begin anew


class Entry(NamedTuple):
    """One evaluation: ``series`` it is of (such as a method), its own name, its document."""

    series: str
    name: str
    document: Document


def efficacy_against_damage(entries: Sequence[Entry]) -> str | None:
    """Still answered over the share of retained facts that are lost; lower left is best.

    Without a retain file, over the neighbours that are lost.
    """
    figure = next((f for f in ("retained", "specificity") if _has(entries, f)), None)
    if figure is None or not _has(entries, "efficacy"):
        return None
    several = len(entries) > 1
    kinds = _kinds(entries)
    points: list[Point] = []
    for entry in entries:
        for side in ("patched",) if several else ("base", "patched"):
            lost, left = 1 - entry.document[side][figure], entry.document[side]["efficacy"]
            spans = entry.document["intervals"].get(side, {})
            points.append(
                Point(
                    lost,
                    left,
                    kinds[entry.series] if several else side,
                    f"{entry.name}, {side}: {left:.1%} still answered, {lost:.1%} of others lost",
                    "" if several else side,
                    x_span=_flipped(_span(spans.get(figure))),
                    y_span=_span(spans.get("efficacy")),
                )
            )
    across = [v for p in points for v in (p.x, *(p.x_span or ()))]
    words = {"retained": "retained facts lost", "specificity": "neighbours not answered"}
    up = [v for p in points for v in (p.y, *(p.y_span or ()))]
    return plane(
        axis(words[figure], across, zero=True),
        axis("facts still answered", up, zero=True),
        points,
        tracks=[Track(name, kind) for name, kind in kinds.items()] if several else (),
    )


def damage_by_facts(entries: Sequence[Entry]) -> str | None:
    """Retained facts lost over the number of facts, a line a series."""

    def lost(document: Document) -> tuple[float, tuple[float, float] | None] | None:
        kept = document["patched"]["retained"]
        span = _span(document["intervals"].get("patched", {}).get("retained"))
        return None if kept is None else (1 - kept, _flipped(span))

    return _by_facts(entries, "retained facts lost", lost, zero=True)


def perplexity_by_facts(entries: Sequence[Entry]) -> str | None:
    """Perplexity over the base's, over the number of facts, a line a series."""

    def ratio(document: Document) -> tuple[float, None] | None:
        before, after = (document[side]["perplexity"] for side in ("base", "patched"))
        return None if before is None or after is None else (after / before, None)

    return _by_facts(entries, "perplexity over the base's", ratio, zero=False)


Cost = Callable[[Document], tuple[float, tuple[float, float] | None] | None]


def _by_facts(entries: Sequence[Entry], title: str, cost: Cost, *, zero: bool) -> str | None:
    kinds = _kinds(entries)
    points: list[Point] = []
    at: dict[str, dict[int, list[float]]] = {}
    for entry in entries:
        found = cost(entry.document)
        if found is None:
            continue
        value, span = found
        count = entry.document["counts"]["patched"]["efficacy"]["of"]
        label = f"{entry.name}: {count} facts, {title} {value:.4g}"
        points.append(Point(count, value, kinds[entry.series], label, y_span=span))
        at.setdefault(entry.series, {}).setdefault(count, []).append(value)
    if len({point.x for point in points}) < 2:
        return None
    up = [v for p in points for v in (p.y, *(p.y_span or ()))]
    tracks = [
        Track(name, kinds[name], [(n, fmean(found)) for n, found in sorted(values.items())])
        for name, values in at.items()
    ]
    across = axis("facts forgotten", [p.x for p in points], zero=True, whole=True)
    return plane(across, axis(title, up, zero=zero), points, tracks=tracks)


def before_and_after(document: Document) -> str | None:
    """Each fact's answer: its log-probability after the patch over that before."""
    found = document["probes"].get("probability")
    if not found:
        return None
    before, after = found["base"]["each"], found["patched"]["each"]
    points = [
        Point(x, y, "patched", f"fact {i}: {x:.2f} before, {y:.2f} after")
        for i, (x, y) in enumerate(zip(before, after, strict=True), 1)
    ]
    return plane(
        axis("log-probability of the answer before, nats", before),
        axis("after, nats", [*after, *before]),
        points,
        diagonal=True,
    )


def relearning(document: Document) -> str | None:
    """Share of the held-out facts that are answered, over the steps of teaching the others."""
    found = document["probes"].get("relearn")
    if not found:
        return None
    rows = {
        side: list(zip(found[side]["steps"], found[side]["held_out"], strict=True))
        for side in SIDES
    }
    return _two_lines("steps of fine-tuning on the other half", "held-out facts answered", rows)


def readable(document: Document) -> str | None:
    """Share of facts whose answer is in the top ten of the read-out, layer by layer."""
    found = document["probes"].get("lens")
    if not found:
        return None
    rows = {side: list(enumerate(found[side]["layers"])) for side in SIDES}
    return _two_lines("layer", "answer in the top ten", rows)


SIDES = ("base", "patched")


def _two_lines(
    across: str, up: str, rows: Mapping[str, Sequence[tuple[int, Mapping[str, Any]]]]
) -> str:
    points = [
        Point(x, share["share"], side, f"{side}, {x}: {share['yes']} of {share['of']}")
        for side in SIDES
        for x, share in rows[side]
    ]
    tracks = [Track(side, side, [(x, s["share"]) for x, s in rows[side]]) for side in SIDES]
    places = axis(across, [p.x for p in points], zero=True, whole=True)
    return plane(places, Axis(up, 0.0, 1.05), points, tracks=tracks)


def damage_by_layer(document: Document) -> str | None:
    """Retained facts lost with each edited module alone."""
    found = document["probes"].get("layers")
    return _lost(
        "retained facts lost, this module alone", found["alone"] if found else {}, "retained"
    )


def damage_by_group(document: Document) -> str | None:
    """Retained facts lost, a bar a group."""
    groups = document["groups"].get("retained") or {}
    return _lost("retained facts lost", groups, "patched")


def _lost(title: str, found: Mapping[str, Any], key: str) -> str | None:
    rows = [
        Bar(
            name,
            1 - one[key]["share"],
            f"{one[key]['of'] - one[key]['yes']} of {one[key]['of']} lost",
            _flipped(_span(one[key]["interval"])),
        )
        for name, one in found.items()
        if one[key]["share"] is not None
    ]
    return _bars(title, rows)


def changes(document: Document) -> str | None:
    """How far each edited module moved, relative to its weight's norm."""
    rows = [
        Bar(name, one["delta"] / one["weight"], f"{one['delta']:.4g} on {one['weight']:.4g}")
        for name, one in document["changed"].items()
        if one["weight"]
    ]
    return _bars("norm of the change over norm of the weight", rows)


def _bars(title: str, rows: Sequence[Bar]) -> str | None:
    largest = sorted(rows, key=lambda row: -row.value)[:MOST]
    return bars(title, [row for row in rows if row in largest]) if rows else None


def _has(entries: Sequence[Entry], figure: str) -> bool:
    return all(e.document[side][figure] is not None for e in entries for side in SIDES)


def _kinds(entries: Sequence[Entry]) -> dict[str, str]:
    """A colour's class for each series, in their order."""
    names = dict.fromkeys(entry.series for entry in entries)
    return {name: f"s{number % COLOURS}" for number, name in enumerate(names)}


def _span(interval: Mapping[str, Any] | None) -> tuple[float, float] | None:
    return None if interval is None else (interval["low"], interval["high"])


def _flipped(span: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if span is None else (1 - span[1], 1 - span[0])
