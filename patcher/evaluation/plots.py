"""The page's plots, from evaluations' documents; None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .svg import Axis, Bar, Point, axis, bars, plane

Document = Mapping[str, Any]
MOST = 40  # bars in one plot


def efficacy_against_damage(documents: Mapping[str, Document]) -> str | None:
    """Still answered over the share of retained facts that are lost; lower left is best."""
    points: list[Point] = []
    for name, document in documents.items():
        for side in ("base", "patched"):
            kept, left = (document[side][figure] for figure in ("retained", "efficacy"))
            if kept is None or left is None:
                return None
            points.append(
                Point(
                    1 - kept,
                    left,
                    side,
                    f"{name}, {side}: {left:.1%} still answered, {1 - kept:.1%} of others lost",
                    name if side == "patched" and len(documents) > 1 else side,
                    x_span=_flipped(_span(document["intervals"][side]["retained"])),
                    y_span=_span(document["intervals"][side]["efficacy"]),
                )
            )
    across = [v for p in points for v in (p.x, *(p.x_span or ()))]
    return plane(
        axis("retained facts lost", across, zero=True),
        Axis("facts still answered", 0.0, 1.05),
        points,
    )


def cost_by_facts(documents: Mapping[str, Document]) -> str | None:
    """Retained facts lost over the number of facts, one point an evaluation."""
    points = []
    for name, document in documents.items():
        kept = document["patched"]["retained"]
        if kept is None:
            return None
        count = document["counts"]["patched"]["efficacy"]["of"]
        span = _flipped(_span(document["intervals"]["patched"]["retained"]))
        label = f"{name}: {count} facts, {1 - kept:.1%} of others lost"
        points.append(Point(count, 1 - kept, "patched", label, name, y_span=span))
    if len({point.x for point in points}) < 2:
        return None
    up = [v for p in points for v in (p.y, *(p.y_span or ()))]
    return plane(
        axis("facts forgotten", [p.x for p in points], zero=True),
        axis("retained facts lost", up, zero=True),
        points,
    )


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
    points = [
        Point(step, share["share"], side, f"{side}, step {step}: {share['yes']} of {share['of']}")
        for side in ("base", "patched")
        for step, share in zip(found[side]["steps"], found[side]["held_out"], strict=True)
    ]
    return plane(
        axis("steps of fine-tuning on the other half", [p.x for p in points], zero=True),
        Axis("held-out facts answered", 0.0, 1.05),
        points,
    )


def damage_by_group(document: Document) -> str | None:
    """Retained facts lost, a bar a group."""
    groups = document["groups"].get("retained") or {}
    rows = [
        Bar(
            name,
            1 - one["patched"]["share"],
            f"{one['patched']['of'] - one['patched']['yes']} of {one['patched']['of']} lost",
            _flipped(_span(one["patched"]["interval"])),
        )
        for name, one in groups.items()
        if one["patched"]["share"] is not None
    ]
    return _bars("retained facts lost", rows)


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


def _span(interval: Mapping[str, Any] | None) -> tuple[float, float] | None:
    return None if interval is None else (interval["low"], interval["high"])


def _flipped(span: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if span is None else (1 - span[1], 1 - span[0])
