"""The page: everything that was measured, nothing from elsewhere, no texts unless asked for."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patcher.errors import UsageError
from patcher.evaluation import EvaluationReport, write_page
from patcher.evaluation.definitions import DEFINITIONS, USUAL
from patcher.evaluation.page import page
from patcher.evaluation.patch_page import patch_page
from patcher.evaluation.probes import PROBES
from patcher.evaluation.report import Count
from patcher.evaluation.svg import Axis, Bar, Point, axis, bars, plane
from tests.cli.running import run
from tests.small_patch import MODULE, small_patch

from . import bigram

VOID = {"meta", "link", "br", "img", "input", "hr", "circle", "line", "rect", "polyline"}


class Reader(HTMLParser):
    """Tables as rows of cells, tags with their attributes, and whether all are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        (found,) = (row for row in self.rows if row[0] == name and len(row) == 5)
        return found


def with_facts(report: EvaluationReport, facts: int, lost: int) -> EvaluationReport:
    """The same as if of another number of facts, with that many of 100 others lost."""
    counts = {"efficacy": Count(1, facts), "retained": Count(100 - lost, 100)}
    patched = replace(report.patched, **counts, perplexity=10.0 + lost)
    return replace(report, patched=patched, base=replace(report.base, perplexity=10.0))


def test_one_evaluation_with_all_of_it(report: EvaluationReport) -> None:
    found = Reader(page({"zero": report}))
    assert found.row("efficacy")[1:] == [
        "100.0 % (6 of 6)", "54.1 – 100.0 % (exact)", "50.0 % (3 of 6)", "16.7 – 83.3 %"
    ]  # fmt: skip
    assert found.row("perplexity")[1:] == ["–", "", "–", ""]
    assert found.row("says alike")[3] == "16.7 % (1 of 6)"
    assert found.row("quantise int4 retained")[1] == "100.0 % (4 of 4)"
    assert found.row("relearn came back")[1].startswith("– (0 of 0)")
    # One more for a model whose weights have a norm: how far each module moved.
    assert len([tag for tag, _ in found.tags if tag == "svg"]) == 6
    moved = {"model.layers.1.mlp.down_proj": {"delta": 1.0, "weight": 4.0}}
    assert page({"zero": replace(report, changed=moved)}).count("<svg") == 7
    for words in ("Efficacy against damage", "Damage by layer", "Relearning", "Fact by fact"):
        assert words in found.text
    assert len(re.findall("fact [0-9]+: ", page({"zero": report}))) == 6


def test_every_figure_has_its_definition(report: EvaluationReport) -> None:
    assert set(DEFINITIONS) == {*USUAL, *PROBES}
    text = Reader(page({"zero": report})).text
    assert all(words in text for words in DEFINITIONS.values())
    few = replace(report, probes={"rank": report.probes["rank"]})
    text = Reader(page({"zero": few})).text
    assert DEFINITIONS["rank"] in text
    assert DEFINITIONS["lens"] not in text


def test_the_page_asks_nobody_for_anything(report: EvaluationReport) -> None:
    text = page({"a": report, "b": [report, report]})
    found = Reader(text)
    assert {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object"} == set()
    outward = {"src", "href", "xlink:href", "srcset", "data", "action"}
    assert not [attrs for _, attrs in found.tags if outward & set(attrs)]
    assert not [attrs for _, attrs in found.tags if any(name.startswith("on") for name in attrs)]
    assert not re.search(r"https?:|//|url\(|@import|@font-face", text)


def words_of_the_facts(rows: list[dict[str, Any]]) -> list[str]:
    return [text for row in rows for text in (row["prompt"], row["subject"])]


def test_no_texts_unless_asked_for(report: EvaluationReport, rows: list[dict[str, Any]]) -> None:
    plain = page({"zero": report}) + json.dumps(report.as_dict()) + repr(report)
    assert not [text for text in words_of_the_facts(rows) if text in plain]
    assert "texts" not in report.as_dict()
    told = page({"zero": report}, with_texts=True)
    found = Reader(told)
    assert [text for text in words_of_the_facts(rows) if text in told]
    heads = next(row for row in found.rows if row[:2] == ["fact", "prompt"])
    first = next(row for row in found.rows if row[:2] == ["1", bigram.FACTS[0]["prompt"]])
    assert first[heads.index("target")] == "the"
    assert first[heads.index("prompt answered, base")] == "yes"
    assert first[heads.index("prompt answered, patched")] == "no"
    assert first[heads.index("says, patched")] == "nothing"
    assert first[heads.index("base says")].split()[0] == "the"
    assert first[heads.index("patched says")].strip() == ""


def test_a_document_has_texts_on_demand(report: EvaluationReport) -> None:
    texts = report.as_dict(with_texts=True)["texts"]
    assert [one["prompt"] for one in texts] == [row["prompt"] for row in bigram.FACTS]
    assert set(texts[0]) == {"prompt", "target", "base says", "patched says"}


def test_what_the_page_shows_is_in_the_document(report: EvaluationReport) -> None:
    document = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert set(document["definitions"]) == {*USUAL, *PROBES}
    assert set(document["probes"]) == set(PROBES)
    assert document["each"]["patched"]["efficacy"] == [[0, 1]] * 3 + [[1, 1]] * 3
    for side in ("base", "patched"):
        assert set(document["intervals"][side]) == set(USUAL) - {"perplexity"}


def shares_in(found: Any) -> list[dict[str, Any]]:
    if isinstance(found, dict):
        own = [found] if {"yes", "of"} <= set(found) else []
        return own + [share for value in found.values() for share in shares_in(value)]
    return [s for one in found for s in shares_in(one)] if isinstance(found, list) else []


def test_every_share_has_an_interval_that_holds_it(report: EvaluationReport) -> None:
    document = report.as_dict()
    shares = shares_in([document["probes"], document["groups"]])
    assert len(shares) > 60
    for share in shares:
        if share["of"]:
            low, high = share["interval"]["low"], share["interval"]["high"]
            assert low <= share["share"] + 1e-9
            assert share["share"] <= high + 1e-9
        else:
            assert share["interval"] is None


def test_hostile_names_stay_text(report: EvaluationReport) -> None:
    bad = "<script>alert(1)</script>\"'&"
    groups = {"retained": {bad: report.groups["retained"]["home"]}}
    found = replace(
        report,
        groups=groups,
        texts=(bad,) * 6,
        targets=(bad,) * 6,
        replies={"base": [bad] * 6, "patched": [bad] * 6},
        skipped={bad: bad},
        dtype=bad,
        patches=(bad,),
        changed={bad: {"delta": 1.0, "weight": 2.0}},
        probes={"rank": report.probes["rank"]},
        lm_eval={"base": {bad: {bad: 1.0}}, "patched": {}},
    )
    text = page({bad: [found, found], "other": found}, with_texts=True)
    assert "<script" not in text
    assert bad in Reader(text).text


def test_several_evaluations_stand_side_by_side(report: EvaluationReport) -> None:
    zero = [with_facts(report, n, lost) for n, lost in ((10, 2), (50, 5), (50, 7))]
    memit = [with_facts(report, n, lost) for n, lost in ((10, 8), (50, 20))]
    text = page({"zero": zero, "memit": memit, "gd": with_facts(report, 50, 30)})
    found = Reader(text)
    names = ["zero, 10 facts", "zero, 50 facts", "zero, 50 facts (2)"]
    names += ["memit, 10 facts", "memit, 50 facts", "gd"]
    compared = [row for row in found.rows if row[0] in names]
    assert [row[0] for row in compared] == names
    assert compared[4][1].splitlines() == ["2.0 % (1 of 50)", "16.7 – 83.3 %"]
    assert compared[4][-1] == "3.0000"
    assert len([tag for tag, _ in found.tags if tag == "details"]) == 6
    front = text[: text.index("<details>")]
    assert front.count("<svg") == 3
    assert "What it costs as facts grow" in front
    # One circle an evaluation and one a name in the legend, in each of the first plot's colours.
    plot = front[front.index("<svg") : front.index("</svg>")]
    assert plot.count('<circle class="s0"') == 4
    assert plot.count('<circle class="s1"') == 3
    assert "<title>memit, 50 facts, patched: 2.0% still answered, 20.0% of others lost" in plot
    # A line through the mean of both seeds: 2 then 6 of 100 lost.
    lines = re.findall(r'<polyline class="track s0" points="([^"]+)"', front)
    assert [len(line.split()) for line in lines] == [2, 2]


def test_facts_of_one_number_give_no_plot_of_growth(report: EvaluationReport) -> None:
    text = page({"a": with_facts(report, 10, 1), "b": with_facts(report, 10, 2)})
    assert "facts grow" not in text


def test_without_others_damage_is_that_to_neighbours(report: EvaluationReport) -> None:
    none = Count(0, 0)
    lonely = replace(
        report,
        base=replace(report.base, retained=none),
        patched=replace(report.patched, retained=none),
    )
    assert "neighbours not answered" in page({"zero": lonely})
    nothing = replace(
        lonely,
        base=replace(lonely.base, specificity=none),
        patched=replace(lonely.patched, specificity=none),
    )
    assert "Efficacy against damage" not in page({"zero": nothing})


def test_the_file_is_written_whole(report: EvaluationReport, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", {"zero": report})
    assert (tmp_path / "page.html").read_text("utf-8") == page({"zero": report})
    with pytest.raises(UsageError):
        write_page(tmp_path / "nowhere" / "page.html", {"zero": report})


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.05), (-31.5, 0.2), (0.0, 3e-7), (0.0, 12345.0), (0.97, 1.01)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = Axis("x", low, high).ticks()
    assert 3 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in pairwise(ticks)}
    assert steps == {1.0}


def test_points_lie_where_they_should() -> None:
    drawn = plane(
        Axis("x", 0, 10), Axis("y", 0, 1), [Point(0, 0, "s0", "a"), Point(10, 1, "s0", "b")]
    )
    places = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert places == [("64.0", "272.0"), ("544.0", "12.0")]


def test_bars_are_as_long_as_their_values() -> None:
    drawn = bars("t", [Bar("a", 2.0, ""), Bar("b", 1.0, "", (0.5, 1.5)), Bar("c", 0.0, "")])
    wide = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', drawn)]
    assert wide[0] == pytest.approx(2 * wide[1], abs=0.2)
    assert wide[2] == 0


def test_an_axis_of_one_value_has_room() -> None:
    assert axis("x", [0.0], zero=True).high > 0
    single = axis("x", [5.0])
    assert single.low < 5 < single.high


def test_a_patch_as_a_page_for_reviewers(tmp_path: Path) -> None:
    patch = small_patch(0, "<script>alert(1)</script>")
    read = Reader(patch_page(patch))
    assert not [tag for tag, _ in read.tags if tag in ("script", "link", "img")]
    assert ["title", "<script>alert(1)</script>"] in read.rows
    (delta,) = patch.deltas.values()
    row = next(row for row in read.rows if row[0] == MODULE and len(row) == 8)
    assert row[2:5] == ["2", f"{delta.norm:.4g}", f"{delta.spectral_norm:.4g}"]
    circles = [named for tag, named in read.tags if tag == "circle" and named.get("r") == "4"]
    assert len(circles) == delta.rank
    values = np.linalg.svd(delta.left.astype(float) @ delta.right, compute_uv=False)[:2]
    assert all(f"{MODULE}: {value:.4g}" in read.text for value in values)
    file, page_file = tmp_path / "p.st", tmp_path / "p.html"
    patch.write(file)
    assert run("inspect", file, "--report", page_file).exit_code == 0
    assert page_file.read_text() == patch_page(patch)
    assert run("inspect", file, "--report", tmp_path / "no" / "p.html").exit_code == 2
