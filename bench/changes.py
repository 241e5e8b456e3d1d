"""What the ways of bench/apply.py did: one event each, the table, the bars, the plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from report import Check, Plot, Spread, at_most, line

APPLY, CALL, RESET, PREFILL = "patcher apply", "client's call, continue", "bare reset", "prefill"
UPDATE, RELOAD, LORA = "vLLM update in place", "vLLM reload", "vLLM LoRA load"
RESTART = "restart"

WHY_CALL = (
    "Profile (one thread, other work beside it): the reload reads 269 MB from the page cache and"
    " packs them. The call stages five modules, about 38 ms each, of which 30 are two exact"
    " read-outs of a oneDNN pack (a product with all unit vectors, 2.7 GFLOP, at the core's full"
    " speed; fold, digests and pack are 1 to 2 ms each). Under load each of some fifteen calls to"
    " the ranks also waits for the step under way, and a read-out goes to a step. Needed: a way to"
    " read a pack without multiplying, which vLLM hasn't got; by these figures the idle call would"
    " take 0.12 s (an estimate). It grows with the modules that are patched, the reload with the"
    " model."
)
WHY_CONTINUE = (
    "Staging a module and reading it back are a call each, which a step waits for: about half a"
    " step. Where a gap is longer than two steps it was so in single rounds; what those waited for"
    " was not found. The median of so few rounds takes them in."
)
NOTES = (
    "Gaps are held against tokens of context, since contexts grow while the ways take turns. "
    "vLLM's update and reload record, check and restore nothing, and need its dev mode; its LoRA "
    "load serves other requests than those that run.",
)


@dataclass
class Event:
    """What one way did in one round, in seconds. ``tokens``: of all contexts at the gap."""

    context: int
    way: str
    seconds: float
    gap: float = 0.0
    step: float = 0.0
    tokens: int = 1
    told: dict[str, float] = field(default_factory=dict)

    @property
    def gap_per_token(self) -> float:
        return self.gap / self.tokens


def rows(found: list[Event]) -> list[dict[str, Any]]:
    keys = dict.fromkeys((event.context, event.way) for event in found)
    table = []
    for context, way in sorted(keys, key=lambda key: key[0]):
        events = [e for e in found if (e.context, e.way) == (context, way)]
        seconds = Spread.of(e.seconds for e in events)
        row: dict[str, Any] = {"context": context or "idle", "way": way, "rounds": len(events)}
        row |= {"seconds": seconds.median, "least": seconds.low, "most": seconds.high}
        for part in sorted({name for e in events for name in e.told}):
            row[f"{part} ms"] = Spread.of(e.told[part] for e in events).median
        if context:
            row["gap s"] = Spread.of(e.gap for e in events).median
            if way != PREFILL:
                row["step ms"] = 1000 * Spread.of(e.step for e in events).median
            row["tokens"] = Spread.of(e.tokens for e in events).median
        table.append(row)
    return table


def checks(found: list[Event], contexts: Mapping[int, int]) -> list[Check]:
    def of(context: int, way: str) -> list[Event]:
        return [e for e in found if (e.context, e.way) == (context, way)]

    def median(context: int, way: str) -> float:
        return Spread.of(e.seconds for e in of(context, way)).median

    flush = Spread.of(e.told["flush"] for e in found if "flush" in e.told).median
    made = [at_most("call / reload, idle", median(0, CALL) / median(0, RELOAD), 0.1, WHY_CALL)]
    for context in contexts:
        under = f"{context} tokens, 8 streams"
        if of(context, RELOAD):
            ratio = median(context, CALL) / median(context, RELOAD)
            made.append(at_most(f"call / reload, {under}", ratio, 0.1, WHY_CALL))
        for way in (APPLY, CALL):
            step = 1000 * Spread.of(e.step for e in of(context, way)).median
            stop = Spread.of(e.told["stop"] for e in of(context, way)).median
            bar = round(2 * step + flush, 1)
            made.append(at_most(f"stop of {way}, ms, {under}", stop, bar))
        peer = RESET if of(context, RESET) else PREFILL
        costs = [Spread.of(e.gap_per_token for e in of(context, w)).median for w in (APPLY, peer)]
        name = f"gap a token of context / that of the {peer}, {under}"
        made.append(at_most(name, costs[0] / costs[1], 1.2))
        steps = Spread.of(e.gap / e.step for e in of(context, CALL)).median
        made.append(at_most(f"gap in decode steps, continue, {under}", steps, 2.0, WHY_CONTINUE))
    return made


def drawn(found: list[Event]) -> Plot:
    lines = []
    for way in (APPLY, RESET, PREFILL, CALL, UPDATE, RELOAD, LORA):
        points: dict[float, list[float]] = {}
        for event in found:
            if event.context and event.way == way:
                points.setdefault(event.context, []).append(event.gap)
        lines.append(line(way, {x: Spread.of(gaps) for x, gaps in points.items()}))
    return Plot("tokens of each context", "longest gap in a stream, s", lines, log="xy")
