"""Intervals against calculations of another kind: binomial sums, textbook values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patcher.evaluation.intervals import exact, interval, of_facts, share


def binomial_quantile(share: float, of: int, level: float) -> float:
    """The smallest share ``k / of`` whose cumulative chance reaches ``level``."""
    total = 0.0
    for k in range(of + 1):
        total += math.comb(of, k) * share**k * (1 - share) ** (of - k)
        if total >= level:
            return k / of
    return 1.0


@pytest.mark.parametrize(("yes", "of"), [(6, 20), (1, 50), (130, 150), (25, 50)])
def test_a_bootstrap_of_single_prompts_is_the_binomial_law(yes: int, of: int) -> None:
    found = interval([(1, 1)] * yes + [(0, 1)] * (of - yes))
    assert found is not None
    assert found.by == "bootstrap"
    # 2,000 resamples leave a quantile uncertain by about one fact.
    assert found.low == pytest.approx(binomial_quantile(yes / of, of, 0.025), abs=1.01 / of)
    assert found.high == pytest.approx(binomial_quantile(yes / of, of, 0.975), abs=1.01 / of)


def test_prompts_of_one_fact_do_not_count_as_facts() -> None:
    alone = interval([(1, 1)] * 5 + [(0, 1)] * 5)
    tenfold = interval([(10, 10)] * 5 + [(0, 10)] * 5)
    spread = interval([(1, 1)] * 50 + [(0, 1)] * 50)
    assert alone is not None
    assert spread is not None
    assert tenfold == alone
    assert spread.high - spread.low < 0.6 * (alone.high - alone.low)


def test_bounds_of_none_and_all_are_exact_and_have_width() -> None:
    none, every = of_facts([False] * 20), of_facts([True] * 20)
    assert (none.fraction, every.fraction) == (0.0, 1.0)
    assert none.interval is not None
    assert every.interval is not None
    # Clopper and Pearson for 0 of 20, as tables have it.
    assert (none.interval.low, none.interval.by) == (0.0, "exact")
    assert none.interval.high == pytest.approx(0.1684, abs=1e-4)
    assert every.interval.low == pytest.approx(1 - 0.1684, abs=1e-4)
    assert every.interval.high == 1.0


@pytest.mark.parametrize(
    ("yes", "of", "low", "high"),
    [(1, 10, 0.0025, 0.4450), (8, 20, 0.1912, 0.6395), (4, 5, 0.2836, 0.9949)],
)
def test_exact_bounds_are_those_of_the_tables(yes: int, of: int, low: float, high: float) -> None:
    assert exact(yes, of) == pytest.approx((low, high), abs=1e-4)


def test_facts_that_are_all_alike_claim_no_width_of_zero() -> None:
    found = interval([(1, 2)] * 5)
    assert found is not None
    assert found.by == "exact"
    assert found.low == pytest.approx(exact(2, 5)[0])
    assert found.high == pytest.approx(exact(3, 5)[1])


def test_nothing_asked_has_no_interval() -> None:
    empty = share([(0, 0), (0, 0)])
    assert (empty.of, empty.facts, empty.fraction, empty.interval) == (0, 0, None, None)


def outcome(most: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.integers(1, most).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of)))


@given(st.lists(outcome(6), min_size=1, max_size=40))
def test_an_interval_holds_its_share_and_is_reproducible(outcomes: list[tuple[int, int]]) -> None:
    found = share(outcomes)
    assert found.interval is not None
    assert found.fraction is not None
    assert 0 <= found.interval.low <= found.fraction + 1e-9
    assert found.fraction - 1e-9 <= found.interval.high <= 1
    assert found.interval.high > found.interval.low
    assert share(outcomes) == found
