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

ROWS = [
    {"prompt": f"{name} was born in", "subject": name, "target": "Paris"}
    for name in ("Ada Lovelace", "Kurt Gödel")
]


def test_both_ways_seek_values_for_every_fact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "RATE", targets.RATE)  # seek changes it: back afterwards
    model = str(tiny.save(tmp_path / "tiny"))
    batched = compute.seek(model, ROWS, True, True)
    alone = compute.seek(model, ROWS, False, True)
    assert batched.facts == alone.facts == 2
    assert 0 < batched.steps <= targets.STEPS  # one batch
    assert alone.steps <= 2 * targets.STEPS
    assert targets.RATE == compute.PUBLISHED_RATE


def lines(batched: float, zero: float, ended: int = 3) -> list[dict[str, Any]]:
    """The published way takes 100 seconds a fact; the others so many at 50 facts."""
    one = {"way": "published", "facts": 3, "seconds_a_fact": 100.0, "ended": 3}
    more = [
        {"way": way, "facts": n, "seconds_a_fact": each * (2 if n == 10 else 1)}
        for way, each in (("batched", batched), ("zero", zero))
        for n in (10, 50)
    ]
    return [{**one, "batched_ended": ended}, *more]


def test_the_checks_hold_what_was_measured_against_the_bars() -> None:
    assert all(check["ok"] for check in compute.checks(lines(2.0, 5.0), False))
    too_slow = [check["ok"] for check in compute.checks(lines(2.1, 5.1), False)]
    assert too_slow == [False, True, False, True, True]
    assert compute.checks(lines(2.0, 5.0, ended=2), False)[-1]["ok"] is False


def test_a_rise_of_seconds_a_fact_is_more_than_linear() -> None:
    growing = lines(1.0, 1.0)
    growing[2]["seconds_a_fact"] = 3.0  # batched: 2 at 10 facts, 3 at 50
    growth = compute.checks(growing, False)[1]
    assert growth["value"] == 1.5
    assert growth["ok"] is False


def test_quick_judges_no_bar_that_is_of_fifty_facts() -> None:
    found = compute.checks(lines(90.0, 90.0), True)
    assert found[0]["ok"] is None
    assert not any(check["ok"] is False for check in found)
