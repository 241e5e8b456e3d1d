"""What the scripts of ``make bench`` share, and the page made of what they found."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "bench"))

import all as page_module
import report

SCRIPTS = [name for name in page_module.NAMES if (REPOSITORY / "bench" / f"{name}.py").exists()]
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
    text = page_module.page({"fold": made(bad), "stack": made(report.at_most("fine", 1, 2))})
    assert "| [fold](#fold) | slow | 3 | 1.5 | missed by 100% |" in text
    assert "| [stack](#stack) | fine | 1 | 2 | holds |" in text
    assert "- slow: 3 of 1.5. the wall" in text
    assert "| a | b | c |" in text
    assert "| 1 | 0.1235 |  |" in text
    assert "No document of: decode," in text


def test_a_script_that_fails_is_told_and_keeps_the_last_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "benchmarks"
    kept.mkdir()
    (kept / "fold.json").write_text(json.dumps(made(report.at_most("slow", 1.0, 1.5))))
    monkeypatch.setattr(page_module, "ROOT", tmp_path)  # where there are no scripts
    monkeypatch.setattr(sys, "argv", ["all.py", "--only", "fold", "--docs", str(tmp_path)])
    assert page_module.main() == 1
    assert "fold: no document" in capsys.readouterr().err
    assert "slow" in (tmp_path / "benchmarks.md").read_text()


def test_the_page_and_the_plots_are_what_the_documents_give(tmp_path: Path) -> None:
    kept = REPOSITORY / "docs" / "benchmarks"
    (tmp_path / "benchmarks").mkdir()
    for one in kept.glob("*.json"):
        (tmp_path / "benchmarks" / one.name).write_bytes(one.read_bytes())
    page_module.write_page(tmp_path)
    written = (REPOSITORY / "docs" / "benchmarks.md").read_text()
    assert (tmp_path / "benchmarks.md").read_text() == written
    (tmp_path / "again" / "benchmarks").mkdir(parents=True)
    for one in kept.glob("*.json"):
        page_module.draw(json.loads(one.read_text()), tmp_path / f"{one.stem}.svg")
        first = (tmp_path / f"{one.stem}.svg").read_bytes()
        assert first == (tmp_path / "benchmarks" / f"{one.stem}.svg").read_bytes()


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
    assert {"bench", "machine", "seconds", "rows", "checks", "plot"} <= found.keys()
    for check in found["checks"]:
        assert check.keys() - {"why"} == {"name", "value", "bar", "ok"}
    light = next(check for check in found["checks"] if "torch" in check["name"])
    assert light["ok"], "a command loads torch without need"
