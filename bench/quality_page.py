"""``docs/results.md`` and its plots, from the lines of ``quality.py``; nothing by hand."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from quality_plots import write_plots

from patcher.evaluation.intervals import RESAMPLES, Outcome, Share, share

Line = dict[str, Any]
DEFAULT = "zero"
RIVALS = ("memit", "alphaedit", "zero --as-published")
BAR_FACTS = 50  # the number of facts that the bars are about
HEAD = ("kind", "method", "asked", "seed", "part", "model", "data")
FIGURES = {  # -> how a table's head calls it, and the share of what it is
    "answered": ("still answered", "the facts' prompts: every token of the target the arg-max"),
    "leaked": ("in generated text", "facts whose answer stands in 12 greedy tokens"),
    "paraphrases": (
        "paraphrases answered",
        "other wordings that the base answers; none ships with patcher, so none is computed with",
    ),
    "neighbours": ("neighbours kept", "CounterFact's neighbouring prompts that the base answers"),
    "same_answer": (
        "same answer kept",
        "other known facts of the same relation (CounterFact: wording) and answer, two a fact",
    ),
    "kept_counterfact": ("CounterFact kept", "at most 50 other known facts"),
    "kept_world": ("world kept", "at most 100 other known facts"),
}


@dataclass(frozen=True)
class Summary:
    """All seeds of one method and number of facts together; ``low``, ``high``: 95 %."""

    method: str
    asked: int
    facts: int
    seeds: int
    shares: Mapping[str, Share]
    kept: tuple[float, float, float] | None  # a third CounterFact, with its interval
    perplexity: tuple[float, float]  # ratio: mean over seeds, the worst
    seconds: float
    bytes: int
    peak: int

    def fraction(self, name: str) -> float | None:
        return self.shares[name].fraction


def key(line: Line) -> tuple[Any, ...]:
    """What tells a run from all others."""
    return tuple(line.get(name) for name in HEAD)


def lines_of(path: Path) -> list[Line]:
    """The lines of the file, in its order; none where it isn't there."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def latest(lines: Iterable[Line]) -> list[Line]:
    """Of every run the last line that did not fail, else the last one."""
    found: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        if "failed" not in line or "failed" in found.get(key(line), {"failed": ""}):
            found[key(line)] = line
    return list(found.values())


def outcomes(lines: Sequence[Line], figure: str) -> list[Outcome]:
    """Of every fact in those lines, how many of how many prompts."""
    return [
        (int(yes), int(of))
        for line in lines
        for kind, count in line["figures"][figure].items()
        for yes, of in [kind.split("/")]
        for _ in range(count)
    ]


def weighed(
    first: Sequence[Outcome], second: Sequence[Outcome]
) -> tuple[float, float, float] | None:
    """The share kept where ``first`` counts a third, with its bootstrap interval."""
    if not first or not second:
        return None
    draw = np.random.default_rng(0)
    parts = [np.array([yes for yes, _ in one]) for one in (first, second)]
    again = [
        p[draw.integers(0, len(p), (RESAMPLES, len(p)))].mean(1) if p.min() != p.max() else p.mean()
        for p in parts
    ]
    spread = again[0] / 3 + again[1] * 2 / 3
    low, high = np.quantile(np.atleast_1d(spread), [0.025, 0.975])
    value = parts[0].mean() / 3 + parts[1].mean() * 2 / 3
    return float(value), float(low), float(high)


def summarise(lines: Sequence[Line]) -> Summary:
    """One row of a table; the lines differ in their seeds alone."""
    ratios = [one["perplexity"]["patched"] / one["perplexity"]["base"] for one in lines]
    found = {name: outcomes(lines, name) for name in FIGURES}
    return Summary(
        lines[0]["method"],
        lines[0]["asked"],
        max(line["facts"] for line in lines),
        len(lines),
        {name: share(one) for name, one in found.items()},
        weighed(found["kept_counterfact"], found["kept_world"]),
        (sum(ratios) / len(ratios), max(ratios)),
        sum(line["seconds"] for line in lines) / len(lines),
        max(line["bytes"] for line in lines),
        max(line["peak_bytes"] for line in lines),
    )


def tables(lines: Sequence[Line]) -> dict[tuple[str, int], list[Summary]]:
    """Summaries by kind and number of facts, the default method first."""
    groups: dict[tuple[str, int, str], list[Line]] = defaultdict(list)
    for line in lines:
        if "failed" not in line:
            groups[line["kind"], line["asked"], line["method"]].append(line)
    found: dict[tuple[str, int], list[Summary]] = defaultdict(list)
    for (kind, asked, _), group in sorted(
        groups.items(), key=lambda g: (g[0][0] != "one patch", g[0][1], g[0][2] != DEFAULT, g[0][2])
    ):
        found[kind, asked].append(summarise(group))
    return dict(found)


def percent(one: Share) -> str:
    if one.fraction is None or one.interval is None:
        return "–"
    low, high = 100 * one.interval.low, 100 * one.interval.high
    return f"{100 * one.fraction:.1f} % ({one.yes}/{one.of}; {low:.1f}–{high:.1f})"


def third(one: Summary) -> str:
    if one.kept is None:
        return "–"
    value, low, high = (100 * v for v in one.kept)
    return f"{value:.1f} % ({low:.1f}–{high:.1f})"


def table(rows: Sequence[Summary]) -> list[str]:
    heads = [
        "method",
        *(head for head, _ in FIGURES.values()),
        "a third CounterFact",
        "perplexity (worst)",
    ]
    result = [_row(heads), _row(["---"] * len(heads))]
    for one in rows:
        mean, worst = one.perplexity
        cells = [f"`{one.method}`", *(percent(one.shares[name]) for name in FIGURES), third(one)]
        result.append(_row([*cells, f"{mean:.4f} ({worst:.4f})"]))
    return result


def costs(summaries: Sequence[Summary]) -> list[str]:
    heads = ["method", "facts", "seconds", "a fact", "bytes", "peak memory"]
    result = [_row(heads), _row(["---"] * len(heads))]
    for one in sorted(summaries, key=lambda s: (s.method != DEFAULT, s.method, s.asked)):
        each = one.seconds / one.facts
        cells = [f"`{one.method}`", str(one.facts), f"{one.seconds:.0f}", f"{each:.1f}"]
        result.append(_row([*cells, f"{one.bytes:,}", f"{one.peak / 2**20:,.0f} MiB"]))
    return result


@dataclass(frozen=True)
class Bar:
    """One demand: ``measured`` must be at most, or at least, ``bound``."""

    what: str
    bound: float
    at_most: bool
    measured: float | None
    told: str

    @property
    def met(self) -> bool | None:
        """None where there was nothing to ask."""
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


def bars(one: Summary) -> list[Bar]:
    """The issue's bars for one patch, or for a stack of them."""
    shares, worst = one.shares, one.perplexity[1]
    of_shares = [
        Bar(what, bound, at_most, one.fraction(name), percent(shares[name]))
        for what, bound, at_most, name in (
            ("still answered", 0.01, True, "answered"),
            ("paraphrases answered, of those that the base answers", 0.15, True, "paraphrases"),
            ("neighbours kept", 0.95, False, "neighbours"),
        )
    ]
    kept = None if one.kept is None else one.kept[0]
    return [
        *of_shares,
        Bar("other known facts kept, a third CounterFact's", 0.95, False, kept, third(one)),
        Bar("perplexity, the worst seed", 1.01, True, worst, f"{worst:.4f}"),
    ]


def bars_of_reverting(lines: Sequence[Line]) -> list[Bar]:
    """Those for a stack without one of its patches, each in turn."""
    reverted = [{"figures": line["reverted"]} for line in lines]
    back, others = (share(outcomes(reverted, name)) for name in ("back", "others"))
    return [
        Bar("its facts are back", 0.95, False, back.fraction, percent(back)),
        Bar("the other nine's still answered", 0.01, True, others.fraction, percent(others)),
    ]


def told_bars(groups: Mapping[str, Sequence[Bar]]) -> list[str]:
    result = [_row(["what", "bar", "measured", ""]), _row(["---"] * 4)]
    for name, found in groups.items():
        if not found:
            result.append(_row([name, "", "not measured yet", ""]))
        for bar in found:
            sign = "≤" if bar.at_most else "≥"
            bound = f"{sign} {bar.bound:g}" if bar.bound > 1 else f"{sign} {100 * bar.bound:.0f} %"
            verdict = {None: "nothing to ask", True: "met", False: "**not met**"}[bar.met]
            result.append(_row([f"{name}: {bar.what}", bound, bar.told, verdict]))
    return result


def front(lines: Sequence[Line]) -> list[str]:
    """How the default compares with each rival on the draws that both were measured on.

    ``lines``: of one number of facts, none of a run that failed.
    """
    by_name: dict[str, dict[int, Line]] = defaultdict(dict)
    for line in lines:
        by_name[line["method"]][line["seed"]] = line
    result = []
    for name in RIVALS:
        seeds = sorted(by_name[DEFAULT].keys() & by_name[name].keys())
        ours, theirs = (
            summarise([by_name[method][seed] for seed in seeds]) if seeds else None
            for method in (DEFAULT, name)
        )
        if ours is None or theirs is None or ours.kept is None or theirs.kept is None:
            reason = "no draw in common yet" if by_name[name] else "not measured yet"
            result.append(f"- `{name}`: {reason}.")
            continue
        a = (ours.fraction("answered") or 0.0, 1 - ours.kept[0])
        b = (theirs.fraction("answered") or 0.0, 1 - theirs.kept[0])
        if a == b:
            verdict = "the same in both"
        elif a[0] <= b[0] and a[1] <= b[1]:
            verdict = f"`{DEFAULT}` is at least as good in both and better in one"
        elif a[0] >= b[0] and a[1] >= b[1]:
            verdict = f"`{DEFAULT}` is **beaten**"
        else:
            verdict = "neither beats the other: one forgets more, the other damages less"
        drawn = ", ".join(map(str, seeds))
        result.append(
            f"- `{name}`, seeds {drawn}: {100 * b[0]:.1f} % still answered and "
            f"{100 * b[1]:.1f} % of others lost, "
            f"against {100 * a[0]:.1f} % and {100 * a[1]:.1f} %: {verdict}."
        )
    return result


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_page(lines: Sequence[Line], page: Path, part: str) -> None:
    """Write the page and, in a folder of its name beside it, the plots."""
    page.parent.mkdir(parents=True, exist_ok=True)
    text, summaries = render(lines, part)
    plots = write_plots(summaries, page.with_suffix(""), BAR_FACTS)
    for name in ("front", "paraphrases", "facts"):
        link = f"![{plots[name]}](results/{name}.svg)" if name in plots else "Not measured yet."
        text = text.replace(f"PLOT:{name}", link)
    page.write_text(text, "utf-8")


def render(lines: Sequence[Line], part: str) -> tuple[str, list[Summary]]:
    """The page's text, with marks for the plots, and the summaries of single patches."""
    ours = [line for line in latest(lines) if line["part"] == part]
    source = Counter((line["model"], line["data"]) for line in ours).most_common(1)
    ours = [line for line in ours if [(line["model"], line["data"])] == [s for s, _ in source]]
    found = tables(ours)
    single = [one for (kind, _), rows in found.items() if kind == "one patch" for one in rows]
    parts = [_preamble(ours, part), "## The bars", ""]
    stacked = {k: rows for k, rows in found.items() if k[0] != "one patch"}
    default = {k: next((o for o in rows if o.method == DEFAULT), None) for k, rows in found.items()}
    of_stack = [line for line in ours if "reverted" in line and line["method"] == DEFAULT]
    parts += [f"`{DEFAULT}`, {BAR_FACTS} facts, all seeds together.", ""]
    one, stack = default.get(("one patch", BAR_FACTS)), next((default[k] for k in stacked), None)
    parts += told_bars(
        {
            "one patch": bars(one) if one else [],
            "ten patches of five facts": bars(stack) if stack else [],
            "one of the ten reverted": bars_of_reverting(of_stack) if of_stack else [],
        }
    )
    parts += ["", "## Efficacy against damage", "", "PLOT:front", "", "PLOT:paraphrases", ""]
    parts += ["The plots hold all seeds of each method; here are draws that both were measured on."]
    for asked in sorted({one.asked for one in single} | {BAR_FACTS}):
        alike = [o for o in ours if (o["kind"], o["asked"]) == ("one patch", asked)]
        parts += ["", f"At {asked} facts `{DEFAULT}` against:", ""]
        parts += front([line for line in alike if "failed" not in line])
    for (kind, asked), rows in found.items():
        n = max(one.facts for one in rows)
        seeds = sorted({one.seeds for one in rows})
        title = f"{n} facts" if kind == "one patch" else f"{kind}, {n} facts in all"
        many = " to ".join(str(s) for s in (seeds[0], seeds[-1])[: len(seeds)])
        parts += ["", f"## {title}", "", f"Seeds a method: {many}."]
        if n < asked:
            parts.append(f"{asked} were asked for; the pool has no more.")
        parts += ["", *table(rows)]
    parts += ["", "## What it costs as facts grow", "", "PLOT:facts", "", *costs(single)]
    failed = [line for line in ours if "failed" in line]
    if failed:
        parts += ["", "## Runs that failed", ""]
        parts += [_failure(line) for line in failed]
    return "\n".join(parts) + "\n", single


def _failure(line: Line) -> str:
    reason = re.sub(r"\s+", " ", str(line["failed"]))
    return f"- `{line['method']}`, {line['asked']} facts, seed {line['seed']}: {reason}"


def _preamble(lines: Sequence[Line], part: str) -> str:
    machines = sorted({line["machine"] for line in lines})
    commits = sorted({line["commit"] for line in lines})
    models = sorted({line["model"] for line in lines})
    known = max((line["known"] for line in lines), default=[0, 0])
    return f"""\
# What was measured

Written by `python bench/quality.py --render` from `bench/results/quality.jsonl`, one line a run;
no figure here is typed by hand. To repeat: `python bench/quality.py --data DIR`, then
`--stacked`, then `--render`; `DIR` holds the project's data, `tests/data` has fewer facts.

- Model: {", ".join(models) or "none yet"}, weights rounded to what is served (bfloat16).
- Machine: {"; ".join(machines) or "none yet"}. Times are of a machine that other work shared.
- Commits: {", ".join(commits) or "none yet"} (`+`: with changes that were not committed yet).
- Facts: the `{part}` half of the subjects (by their SHA-256); methods and defaults were chosen on
  the other half. {known[0]} of CounterFact's and {known[1]} of `world.jsonl` are known to the
  model in it. Forgotten are half of each source, as far as at most half of CounterFact's reach.
- A method gets prompt, subject and target of each fact, nothing else. In brackets: the counts,
  and the 95 % interval (percentile bootstrap over facts; exact bounds at nought and all).

{_definitions(lines)}

Prompts that ship with patcher for its statistics come from the same public sets. Facts about their
subjects are in none of these figures, as every patch is computed to leave them alone.
"""


def _definitions(lines: Sequence[Line]) -> str:
    rows = [["figure", "is the share of"], ["---", "---"], *map(list, FIGURES.values())]
    rows.append(["a third CounterFact", "the two before, weighed one to two"])
    rows.append(["perplexity", "(a ratio to the base's) WikiText-2; mean of the seeds, the worst"])
    return "\n".join([*map(_row, rows), "", f"Others that are there to be asked: {_left(lines)}."])


def _left(lines: Sequence[Line]) -> str:
    """How many others there were, by number of facts."""
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for line in lines:
        if "figures" in line and line["kind"] == "one patch":
            sizes = [
                sum(line["figures"][name].values()) for name in ("kept_counterfact", "kept_world")
            ]
            found[line["asked"]].append((sizes[0], sizes[1]))
    told = [
        f"at {n} facts {min(a for a, _ in s)} (CounterFact) and {min(b for _, b in s)} (world)"
        for n, s in sorted(found.items())
    ]
    return ", ".join(told) or "none yet"
