"""The page's tables, as HTML: every text is escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .definitions import USUAL
from .lines import Line, Value, probe_lines, usual_lines
from .plots import Entry
from .report import EvaluationReport

SIDES = ("base", "patched")
_ASKED = {"efficacy": "prompt answered", "generalization": "other wordings answered"}
_EACH = (
    ("probability", "log-probability", "{:.2f}"),
    ("rank", "rank", "{}"),
    ("sampling", "of 20 samples", "{}"),
    ("says", "says", "{}"),
)


def table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways; a head that begins with ``>`` aligns to the right."""
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
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead>{rows}</table></div>'


def comparison(entries: Sequence[Entry]) -> str:
    """One row an evaluation: the patched weights' usual figures, intervals beneath."""
    body = []
    for name, document in ((entry.name, entry.document) for entry in entries):
        lines = {line.probe: line for line in usual_lines(document)}
        before, after = lines["perplexity"].base, lines["perplexity"].patched
        ratio = "–"
        if isinstance(before, float) and isinstance(after, float):
            ratio = f"{after / before:.4f}"
        shares = [lines[figure].patched for figure in USUAL[:4]]
        body.append([name, *(f"{value(one)}\n{span(one)}".strip() for one in shares), ratio])
    heads = [f">{figure}" for figure in USUAL[:4]]
    return table(["evaluation", *heads, ">perplexity over the base's"], body)


def figures(lines: Sequence[Line]) -> str:
    """One row a figure, base and patched."""
    body = [
        [
            f"{line.probe} {line.name.replace('_', ' ').replace('.', ' ')}".strip(),
            *(cell for one in (line.base, line.patched) for cell in (value(one), span(one))),
        ]
        for line in lines
    ]
    return table(["figure", ">base", ">95 % interval", ">patched", ">95 % interval"], body)


def usual(document: Mapping[str, Any]) -> str:
    """The usual figures."""
    return figures(usual_lines(document))


def further(document: Mapping[str, Any]) -> str | None:
    """The probes' figures; None without any."""
    lines = probe_lines(document)
    return figures(lines) if lines else None


def value(found: Value) -> str:
    """A share with its count, or a number."""
    if found is None:
        return "–"
    if isinstance(found, Mapping):
        share = "–" if found["share"] is None else f"{100 * found['share']:.1f} %"
        return f"{share} ({found['yes']} of {found['of']})"
    return str(found) if isinstance(found, int) else f"{found:.4g}"


def span(found: Value) -> str:
    """A share's interval; nothing for what has none."""
    interval = found.get("interval") if isinstance(found, Mapping) else None
    if interval is None:
        return ""
    mark = "" if interval["by"] == "bootstrap" else " (exact)"
    return f"{100 * interval['low']:.1f} – {100 * interval['high']:.1f} %{mark}"


def by_fact(report: EvaluationReport, with_texts: bool) -> str | None:
    """One row a fact, before and after; None for an evaluation that kept no single facts."""
    each = report.each
    if not each:
        return None
    asked = [one for one in _EACH if one[0] in report.probes]
    names = [
        *_ASKED.values(),
        *(words for _, words, _ in asked),
    ]
    heads = [f">{words}, {side}" for words in names for side in SIDES]
    texts = report.as_dict(with_texts=True)["texts"] if with_texts else []
    body = []
    for i in range(len(each["base"]["efficacy"])):
        cells = [_of(each[side][figure][i]) for figure in _ASKED for side in SIDES]
        cells += [
            form.format(report.probes[probe][side]["each"][i])
            for probe, _, form in asked
            for side in SIDES
        ]
        body.append([str(i + 1), *(texts[i].values() if with_texts else ()), *cells])
    return table([">fact", *(texts[0] if texts else ()), *heads], body)


def _of(outcome: Sequence[int]) -> str:
    yes, of = outcome
    if not of:
        return "–"
    return ("yes" if yes else "no") if of == 1 else f"{yes} of {of}"


def groups(document: Mapping[str, Any]) -> str | None:
    """Efficacy and retained, a row a group; None without groups."""
    body = [
        [figure, name, *(cell for side in SIDES for cell in (value(g[side]), span(g[side])))]
        for figure, found in document["groups"].items()
        for name, g in found.items()
    ]
    heads = ["figure", "group", ">base", ">95 % interval", ">patched", ">95 % interval"]
    return table(heads, body) if body else None


def modules(document: Mapping[str, Any]) -> str | None:
    """Each edited module: how far it moved and, where it was asked, what it does alone."""
    alone = document["probes"].get("layers", {}).get("alone", {})
    body = []
    for name, moved in document["changed"].items():
        norm = f"{moved['delta'] / moved['weight']:.3g}" if moved["weight"] else "–"
        shares = [alone[name][figure] for figure in ("efficacy", "retained")] if alone else []
        cells = [cell for share in shares for cell in (value(share), span(share))]
        body.append([name, norm, *cells])
    heads = [">efficacy, alone", ">95 % interval", ">retained, alone", ">95 % interval"]
    return table(["module", ">relative change", *(heads if alone else ())], body) if body else None


def tasks(document: Mapping[str, Any]) -> str | None:
    """lm-evaluation-harness's numbers; None where it was not run."""
    found = document["lm_eval"]
    if not found:
        return None
    body = [
        [task, name, *(_number(found[side].get(task, {}).get(name)) for side in SIDES)]
        for task, values in found["base"].items()
        for name in values
    ]
    return table(["task", "figure", ">base", ">patched"], body)


def _number(found: float | None) -> str:
    return "–" if found is None else f"{found:.4g}"
