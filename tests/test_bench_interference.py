"""bench/interference.py: its rank correlation and what it takes from a comparison."""

from __future__ import annotations

import sys

import pytest

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "bench"))

from interference import predictions, spearman

from patcher.patch.compare import Pair, Shared


def test_the_rank_correlation() -> None:
    assert spearman([1, 2, 3], [10, 20, 900]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3], [5, 5, 5]) is None
    # Ties get their mean rank: 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_predictions_are_roots_of_mean_squares_over_the_modules() -> None:
    modules = {"a": Shared(0.3, 1.0, 7.0, 0.0), "b": Shared(0.4, 5.0, 5.0, 0.1)}
    found = predictions(Pair(0, 1, modules, 0.35, "some"))
    assert found["overlap"] == 0.35
    assert found["disturbs"] == pytest.approx(5)
    assert found["reads"] == pytest.approx((0.01 / 2) ** 0.5)
