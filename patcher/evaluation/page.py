"""An evaluation, or several beside each other, as one HTML page that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..patch.files import write
from . import plots
from .definitions import DEFINITIONS
from .lines import Line, Value, probe_lines, usual_lines
from .report import EvaluationReport

_STYLE = """
:root{--ink:#1d2126;--soft:#5d6670;--rule:#d5dae0;--paper:#fff;--base:#7a8490;--patched:#b3471d}
@media(prefers-color-scheme:dark){:root{--ink:#e3e6ea;--soft:#9aa4af;--rule:#3a424b;
--paper:#15181c;--base:#98a3af;--patched:#f08a5b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:62rem;padding:2rem 1.25rem 4rem;color:var(--ink);
background:var(--paper);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .25rem}
h2{font-size:1.15rem;margin:2.5rem 0 .5rem}
p,dd{max-width:42rem}
.soft,caption,figcaption{color:var(--soft);font-size:.9rem}
caption,figcaption{text-align:left;margin-bottom:.25rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .9rem .3rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--rule)}
th{font-weight:600}
.n{text-align:right;white-space:nowrap}
figure{margin:1.25rem 0}
svg{width:100%;max-width:40rem;height:auto;font:12px system-ui,sans-serif;fill:var(--ink)}
svg line{stroke:var(--soft);stroke-width:1}
svg .grid{stroke:var(--rule)}
svg .guide{stroke-dasharray:4 4}
svg .span{stroke:var(--ink);stroke-width:1.5;opacity:.55}
svg .base{fill:var(--base)}
svg .patched{fill:var(--patched)}
dt{font-weight:600;margin-top:.6rem}
dd{margin:0}
code{overflow-wrap:anywhere}
"""


def write_page(
    path: str | Path, reports: Mapping[str, EvaluationReport], *, with_texts: bool = False
) -> None:
    """Write the page; the file is there whole or not at all.

    Raises:
        UsageError: the place can't be written.
    """
    write(path, page(reports, with_texts=with_texts).encode("utf-8"))


def page(reports: Mapping[str, EvaluationReport], *, with_texts: bool = False) -> str:
    """The page's text: tables, plots, and what every figure means.

    Args:
        reports: by the names that they are to have in tables and plots; several are
            compared, such as one a method.
        with_texts: name facts by prompt and answer; else they are numbered.
    """
    documents = {name: report.as_dict() for name, report in reports.items()}
    parts = ["<h1>What the model still answers</h1>", _summary(documents)]
    parts += _figures("Efficacy against damage", plots.efficacy_against_damage(documents))
    if len(documents) > 1:
        parts += _figures("Cost as facts grow", plots.cost_by_facts(documents))
    for name, report in reports.items():
        parts += _one(name if len(reports) > 1 else "", report, with_texts)
    parts.append(_definitions(documents))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>patcher evaluate</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _summary(documents: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, document in documents.items():
        ids = ", ".join(f"<code>{escape(i[:12])}</code>" for i in document["patches"]) or "none"
        rows.append(
            f"<p>{escape(name)}: {document['facts']} facts looked at, {document['known']} known "
            f"to the base; weights in {escape(document['dtype'])}; facts to retain: "
            f"{document['retain']['known']} known of {document['retain']['facts']}; "
            f"patches, the bottom first: {ids}.</p>"
        )
    return "\n".join(rows)


def _one(name: str, report: EvaluationReport, with_texts: bool) -> list[str]:
    document = report.as_dict()
    suffix = f" – {name}" if name else ""
    parts = [_heading("Figures" + suffix), _figure_table(usual_lines(document))]
    further = probe_lines(document)
    if further:
        parts += [_heading("Further figures" + suffix), _figure_table(further)]
    if document["skipped"]:
        why = "; ".join(f"{escape(n)}: {escape(w)}" for n, w in document["skipped"].items())
        parts.append(f'<p class="soft">Not asked: {why}.</p>')
    parts += _figures("Relearning" + suffix, plots.relearning(document))
    parts += _figures("Answers before and after" + suffix, plots.before_and_after(document))
    parts += _facts(report, with_texts, suffix)
    parts += _figures("Damage by group of retained facts" + suffix, plots.damage_by_group(document))
    parts += _groups(document, suffix)
    parts += _figures("Change of each module" + suffix, plots.changes(document))
    parts += _tasks(document, suffix)
    return parts


def _figure_table(lines: Sequence[Line]) -> str:
    body = [
        [
            f"{line.probe} {line.name.replace('_', ' ').replace('.', ' ')}".strip(),
            *(
                cell
                for value in (line.base, line.patched)
                for cell in (_value(value), _span(value))
            ),
        ]
        for line in lines
    ]
    return _table(["figure", ">base", ">95 % interval", ">patched", ">95 % interval"], body)


def _value(value: Value) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        found = value["share"]
        share = "–" if found is None else f"{100 * found:.1f} %"
        return f"{share} ({value['yes']} of {value['of']})"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _span(value: Value) -> str:
    found = value.get("interval") if isinstance(value, Mapping) else None
    if found is None:
        return ""
    mark = "" if found["by"] == "bootstrap" else " (exact)"
    return f"{100 * found['low']:.1f} – {100 * found['high']:.1f} %{mark}"


def _facts(report: EvaluationReport, with_texts: bool, suffix: str) -> list[str]:
    """One row a fact, where a probe looked at single facts."""
    columns: list[tuple[str, str, str]] = [
        ("probability", "log-probability", "{:.2f}"),
        ("rank", "rank", "{}"),
        ("sampling", "samples of 20", "{}"),
    ]
    asked = [column for column in columns if column[0] in report.probes]
    if not asked:
        return []
    body = []
    for i, (text, target) in enumerate(zip(report.texts, report.targets, strict=True)):
        cells = [
            form.format(report.probes[probe][side]["each"][i])
            for probe, _, form in asked
            for side in ("base", "patched")
        ]
        named = [text, target] if with_texts else []
        body.append([str(i + 1), *named, *cells])
    heads = [f">{words}, {side}" for _, words, _ in asked for side in ("base", "patched")]
    names = ["prompt", "answer"] if with_texts else []
    return [_heading("Fact by fact" + suffix), _table([">fact", *names, *heads], body)]


def _groups(document: Mapping[str, Any], suffix: str) -> list[str]:
    body = [
        [figure, name, *(cell for s in ("base", "patched") for cell in (_value(g[s]), _span(g[s])))]
        for figure, groups in document["groups"].items()
        for name, g in groups.items()
    ]
    if not body:
        return []
    heads = ["figure", "group", ">base", ">95 % interval", ">patched", ">95 % interval"]
    return [_heading("By group" + suffix), _table(heads, body)]


def _tasks(document: Mapping[str, Any], suffix: str) -> list[str]:
    found = document["lm_eval"]
    if not found:
        return []
    body = [
        [
            task,
            name,
            f"{value:.4g}",
            f"{found['patched'].get(task, {}).get(name, float('nan')):.4g}",
        ]
        for task, values in found["base"].items()
        for name, value in values.items()
    ]
    return [
        _heading("lm-evaluation-harness" + suffix),
        _table(["task", "figure", ">base", ">patched"], body),
    ]


def _definitions(documents: Mapping[str, Mapping[str, Any]]) -> str:
    asked = {name for document in documents.values() for name in document["probes"]}
    usual = ("efficacy", "generalization", "specificity", "retained", "perplexity")
    items = [
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"
        for name, text in DEFINITIONS.items()
        if name in usual or name in asked
    ]
    return (
        _heading("What the figures mean") + f"<dl>{''.join(items)}</dl>"
        '<p class="soft">Intervals: percentile bootstrap over facts, 2,000 resamples, seeded; '
        "where all resamples agree, Clopper and Pearson's exact bounds for that many facts "
        "(exact).</p>"
    )


def _figures(title: str, plot: str | None) -> list[str]:
    return [] if plot is None else [_heading(title), f"<figure>{plot}</figure>"]


def _heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Cells are escaped here; a head that begins with ``>`` aligns its column to the right."""
    kinds = [' class="n"' if head.startswith(">") else "" for head in heads]
    top = "".join(
        f"<th{kind}>{escape(head.removeprefix('>'))}</th>"
        for kind, head in zip(kinds, heads, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(f"<td{k}>{escape(cell)}</td>" for k, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in body
    )
    return f'<div class="wide"><table><tr>{top}</tr>{rows}</table></div>'
