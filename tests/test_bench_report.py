"""What the scripts of ``make bench`` share, and the page made of what they found."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "bench"))

import all as benches
import report

SCRIPTS = [name for name in benches.NAMES if (REPOSITORY / "bench" / f"{name}.py").exists()]
ARGS = Namespace(device="cpu", quick=True, json=True)


def made(*checks: report.Check) -> dict[str, Any]:
    spread = {1: report.Spread.of([1.0, 3.0, 2.0]), 4: report.Spread.of([2.0])}
    plot = report.Plot("ranks", "times", [report.line("ours", spread)], 1.5)
    rows: list[dict[str, Any]] = [{"a": 1, "b": 0.123456}, {"a": 2, "c": "x"}]
    return report.document("How fast?", rows, checks, ARGS, plot=plot, notes=["as it is"])


def test_a_spread_is_the_median_the_least_and_the_most() -> None:
    assert report.Spread.of([3.0, 1.0, 2.0, 10.0]) == (2.5, 1.0, 10.0)
    assert report.ratios([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == (2.0, 1.0, 3.0)


def test_ways_are_timed_in_turn_and_the_first_round_is_thrown_away() -> None:
    calls: list[str] = []
    took = report.interleaved({n: partial(calls.append, n) for n in ("a", "b")}, 2)
    assert calls == ["a", "b"] * 3
    assert {name: len(seconds) for name, seconds in took.items()} == {"a": 2, "b": 2}


def test_a_missed_bar_makes_the_exit_code_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    good = report.at_most("quick", 1.0, 1.0, "never told")
    bad = report.at_least("high", 0.9, 1.0, "the wall")
    assert report.finish(made(good), ARGS) == 0
    assert report.finish(made(good, bad), ARGS) == 1
    told = json.loads(capsys.readouterr().out.partition("\n}\n")[2])
    assert told["checks"] == [
        {"name": "quick", "value": 1.0, "bar": 1.0, "ok": True},
        {"name": "high", "value": 0.9, "bar": 1.0, "ok": False, "why": "the wall"},
    ]


def test_the_page_tells_what_holds_what_was_missed_by_how_much_and_what_is_absent() -> None:
    bad = report.at_most("slow", 3.0, 1.5, "the wall")
    text = benches.page({"fold": made(bad), "stack": made(report.at_most("fine", 1, 2))})
    assert "| [fold](#fold) | slow | 3 | 1.5 | missed by 100% |" in text
    assert "| [stack](#stack) | fine | 1 | 2 | holds |" in text
    assert "- slow: 3, the bar is 1.5 (missed by 100%). the wall" in text
    assert "1 of 2 bars hold" in text
    assert "| a | b | c |" in text
    assert "| 1 | 0.1235 |  |" in text
    assert "Not run yet: decode," in text


def test_a_figure_that_is_too_low_is_missed_by_its_share_of_the_bar() -> None:
    text = benches.page({"decode": made(report.at_least("speed", 0.9, 1.0))})
    assert "| speed | 0.9 | 1 | missed by 10% |" in text


def test_a_cell_with_a_bar_in_it_breaks_no_table() -> None:
    one = {**made(), "rows": [{"a | b": "c | d"}]}
    assert "| a \\| b |\n| --- |\n| c \\| d |" in benches.page({"fold": one})


def test_a_document_names_what_it_was_measured_on_and_is_plain_json() -> None:
    found = made(report.at_most("fine", 1, 2))
    assert "/" not in " ".join(map(str, found["machine"].values()))
    json.dumps(found)
    assert {"cpu", "cores", "memory_gib", "python", "torch"} <= found["machine"].keys()
    assert found["question"] == "How fast?"
    assert found["plot"]["lines"][0]["points"] == [(1, 2.0, 1.0, 3.0), (4, 2.0, 2.0, 2.0)]
    assert found["quick"] is True


SCRIPT = """
import json, sys, time
what, document = {what!r}, {document!r}
if what == "stays":
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        open("asked to end", "w").close()
        raise
print(document)
sys.exit({{"crashes": 3, "misses": 1}}.get(what, 0))
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs all.py in a place whose fold.py does as is said: its exit code, the page."""
    docs = tmp_path / "docs"
    (tmp_path / "bench").mkdir()
    monkeypatch.setattr(benches, "ROOT", tmp_path)

    def run(what: str, document: str = "", *words: str) -> tuple[int, str]:
        script = tmp_path / "bench" / "fold.py"
        script.write_text(SCRIPT.format(what=what, document=document))
        if what == "missing":
            script.unlink()
        argv = ["all.py", "--docs", str(docs), *(words or ("--only", "fold"))]
        monkeypatch.setattr(sys, "argv", argv)
        return benches.main(), (docs / "benchmarks.md").read_text()

    return run


GOOD = json.dumps(made(report.at_most("slow", 1.0, 1.5)))
MISSED = json.dumps(made(report.at_most("slow", 3.0, 1.5, "the wall")))


def test_a_missed_bar_is_told_and_is_no_failure(bench: Callable[..., tuple[int, str]]) -> None:
    code, text = bench("misses", MISSED)
    assert code == 0
    assert "missed by 100%" in text
    assert "failed" not in text


@pytest.mark.parametrize(
    ("what", "document", "reason"),
    [
        ("missing", "", "there is no such script"),
        ("crashes", "", "exit code 3, no document"),
        ("crashes", GOOD, "exit code 3 after its document"),
        ("ends", "", "exit code 0, no document"),
        ("ends", "{}", "exit code 0, no document"),
        ("ends", f"chatter\n{GOOD}", "exit code 0, no document"),
    ],
)
def test_a_script_that_fails_is_told_on_the_page_until_it_runs_again(
    bench: Callable[..., tuple[int, str]], what: str, document: str, reason: str
) -> None:
    code, text = bench(what, document)
    assert code == 1
    assert f"**fold failed** when it ran last ({reason}); nothing of it stands here." in text
    assert bench("ends", GOOD) == (0, bench("", "", "--render")[1])
    code, text = bench(what, document)
    assert code == 1
    assert f"({reason}); what stands here is of a run before." in text
    assert "| slow | 1 | 1.5 | holds |" in text
    assert bench("", "", "--render") == (0, text)
    assert "failed" not in bench("ends", GOOD)[1]


def test_a_script_that_takes_too_long_is_asked_to_end_what_it_started(
    bench: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benches, "LONGEST", 3)
    code, text = bench("stays")
    assert code == 1
    assert "(no document within 3 s)" in text
    assert (tmp_path / "asked to end").exists()


def test_the_page_and_the_plots_are_what_the_documents_give(tmp_path: Path) -> None:
    kept = REPOSITORY / "docs" / "benchmarks"
    (tmp_path / "benchmarks").mkdir()
    for one in kept.glob("*.json"):
        (tmp_path / "benchmarks" / one.name).write_bytes(one.read_bytes())
    benches.write_page(tmp_path)
    written = (REPOSITORY / "docs" / "benchmarks.md").read_text()
    assert (tmp_path / "benchmarks.md").read_text() == written
    names = {path.stem for path in kept.glob("*.json")} & set(benches.NAMES)
    assert {path.stem for path in kept.glob("*.svg")} == names


def test_a_plot_has_the_same_bytes_each_time_and_shows_lines_bar_and_names(tmp_path: Path) -> None:
    found = made()
    found["plot"]["ticks"] = ["none", "one of them"]
    for name in ("first", "again"):
        benches.draw(found, tmp_path / f"{name}.svg")
    first = (tmp_path / "first.svg").read_text()
    assert first == (tmp_path / "again.svg").read_text()
    assert "<dc:date>" not in first
    for word in ("ranks", "times", "ours", "one of them", "stroke-dasharray"):
        assert word in first


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_takes_what_make_bench_gives_it(name: str) -> None:
    words = [sys.executable, f"bench/{name}.py", "--help"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for option in ("--quick", "--json", "--device"):
        assert option in done.stdout


def test_a_script_prints_one_document() -> None:
    words = [sys.executable, "bench/client.py", "--quick", "--json"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    assert {"bench", "question", "machine", "seconds", "rows", "checks", "plot"} <= found.keys()
    assert found["bench"] == "client"
    for check in found["checks"]:
        assert check.keys() - {"why"} == {"name", "value", "bar", "ok"}
        assert check["ok"] == (check["value"] <= check["bar"])
    assert done.returncode == (0 if all(check["ok"] for check in found["checks"]) else 1)
    light = next(check for check in found["checks"] if "torch" in check["name"])
    assert light["ok"], light["why"]
