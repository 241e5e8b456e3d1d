"""bench/decode.py and bench/start.py: what their figures are, and that a bar can be missed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from patcher.engine.store import Store
from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "bench"))
import decode
import load
import start
from start import Took


def seconds(patched: float, lora: float = 4.0) -> decode.Seconds:
    """A machine whose speed doubles in mid-run; the engines differ by the same factor all along."""
    pace = [2.0] * 6 + [1.0] * 14
    return {
        decode.PLAIN: pace,
        decode.AGAIN: pace,
        decode.PATCHED: [each * patched for each in pace],
        decode.LORA: [lora],
    }


def test_a_ratio_does_not_see_that_the_machine_became_faster() -> None:
    found = decode.compared(seconds(1.25))
    assert found[decode.PATCHED][:3] == pytest.approx((0.8, 0.8, 0.8))
    assert found[decode.AGAIN].value == 1.0
    assert found[decode.LORA].value == pytest.approx(0.25)


def test_an_interval_is_wider_where_the_rounds_differ() -> None:
    found = decode.ratio([1.0] * 20, [0.9, 1.1] * 10)
    assert found.low < 0.95 < 1.05 < found.high


def test_a_slow_depth_misses_its_bar_and_says_why() -> None:
    found = {
        (depth, batch): decode.compared(seconds(1.05 if depth == 64 else 1.0))
        for depth in (0, 64)
        for batch in (1, 8)
    }
    none, many, doubtless = decode.checks(found)
    assert (none.ok, none.value) == (True, 1.0)
    assert not many.ok
    assert many.value == pytest.approx(1 / 1.05)
    assert not doubtless.ok
    assert "differ by 1.0000" in many.as_dict()["why"]
    drawn = decode.plot(found, [1, 8])
    assert drawn.lines[0].name == "patched, batch 1"
    assert [point[0] for point in drawn.lines[0].points] == [0, 64]


def test_a_slow_batch_cannot_hide_behind_fast_ones() -> None:
    found = {(0, batch): decode.compared(seconds(1.03 if batch == 8 else 0.9)) for batch in (1, 8)}
    (mean, doubtless) = decode.checks(found)
    assert mean.ok
    assert not doubtless.ok


def test_starts_are_compared_within_a_round() -> None:
    took = {
        start.PLAIN: [Took(20.0, 10.0), Took(40.0, 10.0)],
        "0 patches to restore": [Took(20.2, 10.1), Took(40.4, 10.1)],
        "64 patches to restore": [Took(22.0, 11.0), Took(44.0, 11.0)],
    }
    none, many = start.checks(took, [0, 64])
    assert (none.ok, none.bar) == (True, 1.02)
    assert (many.ok, many.bar) == (False, 1.05)
    assert [none.value, many.value] == pytest.approx([1.01, 1.1])
    assert many.as_dict()["why"]
    assert [row["CPU ratio"] for row in start.rows(took)] == [1.0, 1.01, 1.1]


@pytest.mark.model
def test_the_prepared_state_is_one_that_a_start_restores(tmp_path: Path) -> None:
    folder = start.state_with(load.MODEL, tmp_path / "state", 2)
    store = Store(folder)
    assert len(store.in_force().ids) == 2
    assert store.interrupted() is None
    assert [name for name, _ in store.known_modules()] == sorted(
        f"model.layers.{layer}.mlp.down_proj" for layer in range(4)
    )
