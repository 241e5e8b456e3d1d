"""bench/compute.py: seeking values on a tiny random model, and what its checks say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from patcher.unlearn import targets
from tests.conftest import REPOSITORY
from tests.unlearn import tiny

sys.path.insert(0, str(REPOSITORY / "bench"))
import compute
import moments_pass
import seeking
from moments_pass import Passed
from report import Check, Spread

ROWS = [
    {"prompt": f"{name} was born in", "subject": name, "target": "Paris"}
    for name in ("Ada Lovelace", "Kurt Gödel")
]


def test_both_ways_seek_values_for_every_fact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "RATE", targets.RATE)  # seek changes it: back afterwards
    model = str(tiny.save(tmp_path / "tiny"))
    batched = seeking.seek(model, ROWS, True, [0])
    alone = seeking.seek(model, ROWS, False, [0])
    assert batched.facts == alone.facts == 2
    assert 0 < batched.steps <= targets.STEPS  # one batch
    assert alone.steps <= 2 * targets.STEPS
    assert targets.RATE == seeking.PUBLISHED_RATE
    true = seeking.seek(model, ROWS, True, [1])
    assert (true.ended, true.steps > 0) == (0, True)  # nothing was to end


def test_seconds_until_the_published_ways_quality() -> None:
    """Two groups, each of which starts at second 1 of an optimisation that begins at 0."""
    course = [(1.0, 8.0), (2.0, 5.0), (3.0, 4.0), (4.0, 0.0)]
    later = [(6.0, 2.0), (7.0, 1.0), (9.0, 0.1)]
    found = seeking.Sought(9.0, 7, 0, 50, {0: [course, later]})
    assert found.until({0: 0.5}) == 9.0 - 1.0 - 2.0
    assert found.until({0: 1.0}) == 9.0 - 3.0 - 3.0
    assert found.until({0: 0.0}) == 9.0 - 0.0  # the last group never got there
    assert seeking.Sought(9.0, 4, 0, 1, {2: [course[:3]]}).left(2) == 0.5
    assert found.left(0) == 0.0  # all were met


def lines(batched: float, zero: float, ended: int = 3) -> list[dict[str, Any]]:
    """The published way takes 100 seconds a fact; the others so many, at 10 facts and at 50."""
    one = {"way": "published", "facts": 1, "seconds": 25.0, "seconds_a_fact": 25.0, "ended": 3}
    other = {**one, "ended": 0}
    more = [
        {"way": way, "facts": n, "seconds": each * n, "seconds_a_fact": each}
        for way, each in ((compute.EQUAL, batched), ("zero", zero))
        for n in (10, 50)
    ]
    same = {"way": "batched, the published's", "facts": 3, "ended": ended}
    return [one, other, other, other, *more, same]


def passed(speed: float) -> Passed:
    return Passed("x", 10, Spread.of([speed]), Spread.of([1.0]), Spread.of([speed]))


def verdicts(found: list[Check]) -> list[bool]:
    return [check.ok for check in found]


def test_the_checks_hold_what_was_measured_against_the_bars() -> None:
    assert all(verdicts(compute.checks(lines(2.0, 5.0), [passed(0.8)], False)))
    found = compute.checks(lines(2.1, 5.1), [passed(0.79)], False)
    assert verdicts(found) == [False, True, False, True, True, False]
    assert compute.checks(lines(2.0, 5.0, ended=2), [], False)[-1].ok is False


def test_a_rise_of_seconds_a_fact_is_more_than_linear() -> None:
    growing = lines(1.0, 1.0)
    growing[5]["seconds"] = 75.0  # batched: 10 seconds at 10 facts, 75 at 50
    growth = compute.checks(growing, [], False)[1]
    assert growth.value == pytest.approx(1.252, abs=1e-3)
    assert growth.ok is False


def test_quick_judges_no_bar_that_is_of_fifty_facts() -> None:
    assert all(verdicts(compute.checks(lines(90.0, 90.0), [passed(0.9)], True)))


def test_both_passes_for_statistics_run(tmp_path: Path) -> None:
    (found,) = moments_pass.model_pass(str(tiny.save(tmp_path / "tiny")), "cpu")
    assert found.tokens > 1000
    assert found.ratio.low > 0
    assert found.row()["seconds"] >= 0
