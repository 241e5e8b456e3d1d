"""The parts of bench/quality.py that need no model: draws, wordings, lines, the page."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "bench"))
import apart
import quality
import quality_draws as draws
import quality_page as page

DATA = draws.read(REPOSITORY / "tests/data")


def pools(part: str) -> tuple[list[draws.Row], list[draws.Row]]:
    return draws.fit(DATA.counterfact, part), draws.fit(DATA.world, part)


def line(method: str, seed: int, **more: Any) -> page.Line:
    """A run that forgot all of ten facts and lost one of twenty others."""
    return {
        "kind": "one patch",
        "method": method,
        "asked": 50,
        "facts": 50,
        "seed": seed,
        "part": "unseen",
        "model": "m",
        "data": "d",
        "known": [40, 90],
        "commit": "abc",
        "machine": "a machine",
        "figures": {
            "answered": {"0/1": 50},
            "leaked": {"0/1": 50},
            "paraphrases": {"0/3": 8, "1/2": 2},
            "neighbours": {"1/1": 9},
            "same_answer": {"2/2": 3},
            "kept_counterfact": {"0/1": 2, "1/1": 8},
            "kept_world": {"0/1": 1, "1/1": 19},
        },
        "perplexity": {"base": 10.0, "patched": 10.05},
        "seconds": 12.0,
        "bytes": 1000,
        "peak_bytes": 2**30,
        "settings": {},
        **more,
    }


def test_the_halves_share_no_subject_and_make_the_whole() -> None:
    for rows in (DATA.counterfact, DATA.world):
        tuning, unseen, whole = (
            {row["subject"] for row in draws.fit(rows, part)} for part in draws.PARTS
        )
        assert tuning
        assert unseen
        assert not tuning & unseen
        assert tuning | unseen == whole


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("facts", [10, 50, 1000])
def test_what_is_forgotten_and_what_must_stay_are_about_different_subjects(
    facts: int, seed: int
) -> None:
    counterfact, world = pools("all")
    drawn = draws.draw(counterfact, world, facts, seed, frozenset())
    own = {row["subject"] for row in drawn.forget}
    assert len(own) == len(drawn.forget) == min(facts, len(counterfact) // 2 + len(world))
    for others in (drawn.counterfact, drawn.world, *drawn.same):
        assert not own & {row["subject"] for row in others}
    assert len(drawn.counterfact) >= min(50, len(counterfact) // 2)


def test_a_seed_draws_the_same_facts_and_another_one_others() -> None:
    first, again, other = (
        draws.draw(*pools("unseen"), 10, seed, frozenset()).forget for seed in (0, 0, 1)
    )
    assert first == again != other


def test_subjects_of_the_prompts_that_ship_are_not_asked_for() -> None:
    counterfact, world = pools("all")
    shipped = frozenset(row["subject"].casefold() for row in world[:40])
    drawn = draws.draw(counterfact, world, 10, 0, shipped)
    asked = [*drawn.counterfact, *drawn.world, *(row for same in drawn.same for row in same)]
    assert not shipped & {row["subject"].casefold() for row in asked}


def test_lots_are_all_of_the_facts_each_once() -> None:
    drawn = draws.draw(*pools("all"), 50, 0, frozenset())
    lots = draws.split(drawn, 10, 0)
    assert [len(lot) for lot in lots] == [5] * 10
    assert sorted(r["prompt"] for lot in lots for r in lot) == sorted(
        r["prompt"] for r in drawn.forget
    )


def test_no_wording_is_measured_that_is_used_in_computing() -> None:
    used = draws.used_in_computing()
    assert len(used) > 100
    rows = [*draws.fit(DATA.counterfact, "all"), *draws.fit(DATA.world, "all")]
    measured = 0
    for row in rows:
        # The shipped wordings themselves among the row's own: none may come through.
        sneaked = [w.replace("{}", row["subject"]).upper() + "!" for w in list(used)[:5]]
        found = draws.other_wordings({**row, "paraphrases": sneaked}, DATA.wordings, used)
        templates = {draws.normal(text, row["subject"]) for text in found}
        assert not templates & used
        assert draws.template(row) not in templates
        assert not any(row["target"].casefold() in text.casefold() for text in found)
        measured += len(found)
    assert measured > len(rows)


def test_a_used_wording_behind_an_unrelated_sentence_is_left_out() -> None:
    row = {"prompt": "X lies in", "subject": "X", "target": "Y", "rephrase": "It rained. X is in"}
    assert draws.other_wordings(row, [], {"{} is in"}) == []
    assert draws.other_wordings(row, [], {"{} was in"}) == ["It rained. X is in"]


def test_options_follow_a_methods_name() -> None:
    assert quality.options_of("zero") == {"method": "zero"}
    assert quality.options_of("zero --as-published --target eos") == {
        "method": "zero",
        "as_published": True,
        "target": "eos",
    }


def test_a_run_that_is_there_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "lines.jsonl"
    words = ["--results", str(results), "--methods", "zero", "--facts", "10", "--seed", "0"]
    args = quality.parse([*words, "--data", str(REPOSITORY / "tests/data")])
    (head,) = quality.plan(args)
    head = {**head, "data": DATA.digest}
    there = {**line("zero", 0), **head}
    quality.append(results, there)
    assert quality.measure(args) == 0  # without a model: there is nothing to do
    assert "0 runs of 1" in capsys.readouterr().out
    assert page.lines_of(results) == [there]


def test_a_failed_run_does_not_count_as_there_and_does_not_hide_one() -> None:
    good = line("zero", 0)
    failed = {k: v for k, v in good.items() if k in page.HEAD} | {"failed": "too slow"}
    assert page.latest([failed]) == [failed]
    assert page.latest([good, failed]) == [good]
    assert page.latest([failed, good]) == [good]


def test_the_bars_are_computed_from_the_lines() -> None:
    one = page.summarise([line("zero", seed) for seed in range(3)])
    met = {bar.what: bar.met for bar in page.bars(one)}
    assert met == {
        "still answered": True,
        "paraphrases answered, of those that the base answers": True,  # 6 of 84
        "neighbours kept": True,
        "other known facts kept, a third CounterFact's": False,  # 0.8 / 3 + 0.95 * 2 / 3
        "perplexity, the worst seed": True,
    }
    worse = page.summarise([line("zero", 0, perplexity={"base": 10.0, "patched": 10.2})])
    assert page.bars(worse)[-1].met is False
    assert one.kept is not None
    assert one.kept[0] == pytest.approx(0.9)
    assert one.kept[1] < 0.9 < one.kept[2]


def test_methods_are_compared_on_the_draws_that_both_were_measured_on() -> None:
    ours, theirs = line("zero", 0), line("memit", 0)
    answering = {**ours["figures"], "answered": {"0/1": 25, "1/1": 25}}
    lost = {**theirs["figures"], "kept_world": {"0/1": 10, "1/1": 10}}
    lines = [ours, line("zero", 1, figures=answering), {**theirs, "figures": lost}]
    told = page.front(lines)
    assert told[0] == (
        "- `memit`, seeds 0: 0.0 % still answered and 40.0 % of others lost, against "
        "0.0 % and 10.0 %: `zero` is at least as good in both and better in one."
    )
    assert told[1:] == [f"- `{name}`: not measured yet." for name in page.RIVALS[1:]]


def test_the_page_holds_every_method_and_its_plots(tmp_path: Path) -> None:
    lines = [line(method, seed) for method in ("zero", "memit") for seed in (0, 1)]
    lines += [line("zero", 0, asked=10, facts=10)]
    failed = {k: v for k, v in line("rome", 0).items() if k in page.HEAD} | {"failed": "gone"}
    lines.append({**failed, "known": [40, 90], "commit": "abc", "machine": "a machine"})
    stacked = line("zero", 0, kind="10 patches")
    lines.append({**stacked, "reverted": {"back": {"1/1": 50}, "others": {"0/1": 450}}})
    page.write_page(lines, tmp_path / "results.md", "unseen")
    text = (tmp_path / "results.md").read_text("utf-8")
    assert "PLOT:" not in text
    assert "| `memit` | 0.0 % (0/100" in text
    assert "its facts are back | ≥ 95 % | 100.0 % (50/50" in text
    assert "**not met**" in text
    assert "`rome`, 50 facts, seed 0: gone" in text
    assert {p.name for p in (tmp_path / "results").iterdir()} == {
        "front.svg",
        "paraphrases.svg",
        "facts.svg",
    }


def test_nothing_measured_makes_a_page_that_says_so(tmp_path: Path) -> None:
    page.write_page([], tmp_path / "results.md", "unseen")
    assert "not measured yet" in (tmp_path / "results.md").read_text("utf-8")


def test_a_process_of_its_own_gives_its_result_or_says_how_it_ended() -> None:
    found = apart.apart(sorted, [2, 1])
    assert found.result == [1, 2]
    assert found.peak >= found.resting > 0
    with pytest.raises(apart.ApartError, match="TypeError"):
        apart.apart(sorted, 1)
    with pytest.raises(apart.ApartError, match="exit code 3"):
        apart.apart(os._exit, 3)


def test_such_a_process_ends_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "calls.py"
    script.write_text(
        "import pathlib, os, sys, time\n"
        f"sys.path.insert(0, {str(REPOSITORY / 'bench')!r})\n"
        "import apart\n"
        "def stay(file):\n"
        "    pathlib.Path(file).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    apart.apart(stay, sys.argv[1])\n"
    )
    told = tmp_path / "pid"
    caller = subprocess.Popen([sys.executable, str(script), str(told)], stdout=subprocess.PIPE)
    try:
        until(lambda: told.is_file() and told.read_text() != "")
    finally:
        caller.kill()
    caller.communicate(timeout=30)  # the pipe ends with the last process that holds it


def until(true: Callable[[], bool]) -> None:
    for _ in range(300):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError
