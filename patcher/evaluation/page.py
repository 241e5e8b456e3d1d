"""An evaluation, or several beside each other, as one HTML page that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from ..patch.files import write
from . import plots, tables
from .definitions import DEFINITIONS, USUAL
from .plots import Entry
from .report import EvaluationReport

Reports = Mapping[str, EvaluationReport | Sequence[EvaluationReport]]

_STYLE = """
:root{--ink:#1d2126;--soft:#5d6670;--rule:#d5dae0;--paper:#fff;--base:#7a8490;--patched:#b3471d;
--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#cc79a7;--s4:#8a6d00;--s5:#3f9fd8;--s6:#6a3d9a;--s7:#7a8490}
@media(prefers-color-scheme:dark){:root{--ink:#e3e6ea;--soft:#9aa4af;--rule:#3a424b;
--paper:#15181c;--base:#98a3af;--patched:#f08a5b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:2rem 1.25rem 4rem;color:var(--ink);
background:var(--paper);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .25rem}
h2{font-size:1.3rem;margin:2.75rem 0 .5rem}
h3{font-size:1.05rem;margin:1.75rem 0 .4rem}
details{border-bottom:1px solid var(--rule)}
p,dd,figcaption{max-width:44rem}
.soft,figcaption{color:var(--soft);font-size:.9rem}
summary{font-weight:600;cursor:pointer;padding:.5rem 0}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem 1.1rem .3rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--rule)}
th{font-weight:600;vertical-align:bottom}
.n{text-align:right}
td.n{white-space:pre}
figure{margin:.75rem 0 1.25rem}
svg{display:block;width:100%;max-width:42rem;height:auto;font:12px system-ui,sans-serif;
fill:var(--ink)}
svg line{stroke:var(--soft);stroke-width:1}
svg .grid{stroke:var(--rule)}
svg .guide{stroke-dasharray:4 4}
svg .span{stroke:var(--ink);stroke-width:1.5;opacity:.45}
svg .track{fill:none;stroke-width:1.5;opacity:.7}
svg .base{fill:var(--base)}
svg .patched{fill:var(--patched)}
svg .track.base{fill:none;stroke:var(--base)}
svg .track.patched{fill:none;stroke:var(--patched)}
dt{font-weight:600;margin-top:.6rem}
dd{margin:0}
code{overflow-wrap:anywhere}
""" + "".join(
    f"svg .s{n}{{fill:var(--s{n})}}svg .track.s{n},svg .span.s{n}{{fill:none;stroke:var(--s{n})}}\n"
    for n in range(plots.COLOURS)
)


def write_page(path: str | Path, reports: Reports, *, with_texts: bool = False) -> None:
    """Write the page; the file is there whole or not at all.

    Args:
        path: where.
        reports: by name, as :func:`page` has it.
        with_texts: name facts by prompt and answer; else they are numbered.

    Raises:
        UsageError: the place can't be written.
    """
    write(path, page(reports, with_texts=with_texts).encode("utf-8"))


def page(reports: Reports, *, with_texts: bool = False) -> str:
    """The page's text: tables, plots, and what every figure means.

    Args:
        reports: by the names that they are to have in tables and plots, such as one a
            method; a name may have several, such as one a number of facts or a seed,
            which are drawn as one line.
        with_texts: name facts by prompt and answer; else they are numbered.
    """
    named = _named(reports)
    entries = [entry for entry, _ in named]
    parts = ["<h1>What the model still answers</h1>"]
    if len(named) == 1:
        parts += [_about(entries[0]), *_one(*named[0], with_texts)]
    else:
        parts += [_heading("Side by side"), tables.comparison(entries)]
        parts += _front(entries)
        parts += figure(
            "What it costs as facts grow: other facts",
            plots.damage_by_facts(entries),
            "Share of the retain file's facts, of those that the base answers, that are no longer "
            "answered, over the number of facts forgotten. Points: evaluations with their 95 % "
            "interval; lines: their mean.",
        )
        parts += figure(
            "What it costs as facts grow: text",
            plots.perplexity_by_facts(entries),
            "Perplexity of the patched weights over the base's, on the same text.",
        )
        for entry, report in named:
            body = "\n".join([_about(entry), *_one(entry, report, with_texts)])
            parts.append(f"<details><summary>{escape(entry.name)}</summary>\n{body}\n</details>")
    parts.append(_definitions(entries))
    return shell("patcher evaluate", parts)


def shell(title: str, parts: Sequence[str]) -> str:
    """A whole page of ``parts``, which are HTML; nothing in it is fetched from elsewhere."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _named(reports: Reports) -> list[tuple[Entry, EvaluationReport]]:
    """Every evaluation with a name of its own: of several, by how many facts and which one."""
    result: list[tuple[Entry, EvaluationReport]] = []
    taken: dict[str, int] = {}
    for series, found in reports.items():
        several = [found] if isinstance(found, EvaluationReport) else list(found)
        for report in several:
            name = series
            if len(several) > 1:
                name = f"{series}, {report.patched.efficacy.of} facts"
            taken[name] = taken.get(name, 0) + 1
            if taken[name] > 1:
                name = f"{name} ({taken[name]})"
            result.append((Entry(series, name, report.as_dict()), report))
    return result


def _about(entry: Entry) -> str:
    document = entry.document
    ids = ", ".join(f"<code>{escape(i[:12])}</code>" for i in document["patches"]) or "none"
    return (
        f"<p>{document['facts']} facts looked at, {document['known']} known to the base; facts to "
        f"retain: {document['retain']['known']} known of {document['retain']['facts']}; weights in "
        f"{escape(document['dtype'])}; patches, the bottom first: {ids}.</p>"
    )


def _front(entries: Sequence[Entry]) -> list[str]:
    return figure(
        "Efficacy against damage",
        plots.efficacy_against_damage(entries),
        "Lower left is best: nothing of what is to be forgotten is answered, and nothing else is "
        "lost. Bars are 95 % intervals.",
    )


def _one(entry: Entry, report: EvaluationReport, with_texts: bool) -> list[str]:
    document = entry.document
    facts = document["counts"]["base"]["efficacy"]["of"]
    parts = [*_part("Figures", tables.usual(document))]
    parts += _front([entry])
    parts += _part("Further figures", tables.further(document))
    if document["skipped"]:
        why = "; ".join(f"{escape(n)}: {escape(w)}" for n, w in document["skipped"].items())
        parts.append(f'<p class="soft">Not asked: {why}.</p>')
    parts += figure(
        "Relearning",
        plots.relearning(document),
        "Facts of the half that is not taught that are answered, after so many steps of teaching "
        "the other half.",
    )
    parts += figure(
        "What a linear read-out still knows",
        plots.readable(document),
        f"Share of the {facts} facts whose answer's first token is in the top ten when a layer's "
        "output goes straight to the head.",
    )
    parts += figure(
        "Answers before and after",
        plots.before_and_after(document),
        f"One point for each of the {facts} facts. On the dashed line nothing has changed; far "
        "below it the answer has become unlikely.",
    )
    parts += _part("Fact by fact", tables.by_fact(report, with_texts))
    parts += figure(
        "Damage by layer",
        plots.damage_by_layer(document),
        f"Each edited module alone, the others as in the base; of the "
        f"{document['retain']['known']} retained facts that the base answers.",
    )
    parts += figure(
        "How far each module moved",
        plots.changes(document),
        "Frobenius norms, of the weights as they are served.",
    )
    parts += _part("Module by module", tables.modules(document))
    parts += figure(
        "Damage by group of retained facts",
        plots.damage_by_group(document),
        "Groups are the rows' group or relation; each bar is of the facts that the base answers.",
    )
    parts += _part("By group", tables.groups(document))
    parts += _part("lm-evaluation-harness", tables.tasks(document))
    return parts


def _definitions(entries: Sequence[Entry]) -> str:
    asked = {name for entry in entries for name in entry.document["probes"]}
    items = [
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"
        for name, text in DEFINITIONS.items()
        if name in USUAL or name in asked
    ]
    return (
        _heading("What the figures mean") + f"<dl>{''.join(items)}</dl>"
        '<p class="soft">Intervals: percentile bootstrap over facts, 2,000 resamples, seeded; '
        "where all resamples agree, Clopper and Pearson's exact bounds for that many facts "
        "(exact).</p>"
    )


def figure(title: str, plot: str | None, words: str) -> list[str]:
    """A plot under its title, with a caption; nothing where there is no plot."""
    if plot is None:
        return []
    caption = f"<figcaption>{escape(words)}</figcaption>"
    return [f"<h3>{escape(title)}</h3>", f"<figure>{plot}{caption}</figure>"]


def _part(title: str, found: str | None) -> list[str]:
    return [] if found is None else [f"<h3>{escape(title)}</h3>", found]


def _heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"
