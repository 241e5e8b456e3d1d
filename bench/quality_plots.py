"""The plots of ``docs/results.md``, as SVG files of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.evaluation.svg import Axis, Point, axis, plane

if TYPE_CHECKING:
    from quality_page import Summary

# Okabe and Ito's colours, which colour-blind people can tell apart, and black.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d00", "#000000")


def write_plots(summaries: Sequence[Summary], folder: Path, facts: int) -> dict[str, str]:
    """Write what there is to draw into the folder; titles by the files' names."""
    methods = sorted({one.method for one in summaries})
    kinds = {name: f"m{i % len(COLOURS)}" for i, name in enumerate(methods)}
    here = [one for one in summaries if one.asked == facts and one.kept]
    drawn = {
        "front": (
            f"Facts still answered against other facts lost, {facts} facts",
            _front(here, "answered", "facts still answered", kinds),
        ),
        "paraphrases": (
            f"Paraphrases still answered against other facts lost, {facts} facts",
            _front(here, "paraphrases", "paraphrases still answered", kinds),
        ),
        "facts": ("Other facts lost as facts grow", _growth(summaries, kinds)),
    }
    titles = {}
    for name, (title, plot) in drawn.items():
        if plot is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.svg").write_text(_alone(plot, title), "utf-8")
            titles[name] = title
    return titles


def _front(rows: Sequence[Summary], figure: str, title: str, kinds: dict[str, str]) -> str | None:
    points = []
    for one in rows:
        up = one.shares[figure]
        if one.kept is None or up.fraction is None or up.interval is None:
            continue
        value, low, high = one.kept
        points.append(
            Point(
                1 - value,
                up.fraction,
                kinds[one.method],
                f"{one.method}: {up.fraction:.1%} {title}, {1 - value:.1%} of others lost",
                one.method,
                x_span=(1 - high, 1 - low),
                y_span=(up.interval.low, up.interval.high),
            )
        )
    if not points:
        return None
    across = [v for p in points for v in (p.x, *(p.x_span or ()))]
    up_to = max(v for p in points for v in (p.y, *(p.y_span or ())))
    return plane(
        axis("other known facts lost (a third CounterFact's)", across, zero=True),
        Axis(title, 0.0, min(1.05, 1.1 * up_to) or 1.0),
        points,
    )


def _growth(summaries: Sequence[Summary], kinds: dict[str, str]) -> str | None:
    ready = [one for one in summaries if one.kept]
    last = {one.method: max(o.facts for o in ready if o.method == one.method) for one in ready}
    points = [
        Point(
            one.facts,
            1 - one.kept[0],
            kinds[one.method],
            f"{one.method}, {one.facts} facts: {1 - one.kept[0]:.1%} of others lost",
            one.method if one.facts == last[one.method] else "",
            y_span=(1 - one.kept[2], 1 - one.kept[1]),
        )
        for one in ready
        if one.kept
    ]
    if len({point.x for point in points}) < 2:
        return None
    up = [v for p in points for v in (p.y, *(p.y_span or ()))]
    return plane(
        axis(
            "facts forgotten", [p.x for p in points] + [1.25 * max(p.x for p in points)], zero=True
        ),
        axis("other known facts lost", up, zero=True),
        points,
    )


def _alone(plot: str, title: str) -> str:
    """A plot that a page has styled so far, as a file that stands by itself."""
    colours = "".join(f".m{i}{{fill:{c}}}.span.m{i}{{stroke:{c}}}" for i, c in enumerate(COLOURS))
    style = (
        "svg{background:#fff;font:12px system-ui,sans-serif;fill:#1d2126}line{stroke:#5d6670}"
        f".grid{{stroke:#d5dae0}}.span{{stroke-width:1.5;opacity:.55}}{colours}"
    )
    head, _, rest = plot.partition(">")
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{head}><title>{title}</title><style>{style}</style>{rest}\n"
