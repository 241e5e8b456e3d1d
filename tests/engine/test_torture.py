"""A sample of ``make torture``: kill -9 of each kind of process in a change."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.torture import VICTIMS, Torture, broken
from patcher.engine.store import Store
from tests.engine.tiny import tiny_llama

pytestmark = pytest.mark.engine


def test_a_killed_change_is_either_made_or_not_made(tmp_path: Path) -> None:
    torture = Torture(tiny_llama(tmp_path / "model"), tmp_path, seed=7, layers=(0, 3))
    try:
        torture.begin()
        for number, victim in enumerate(VICTIMS[1:]):  # test_restart.py kills the API server
            assert torture.point(number, victim).wrong == []
    finally:
        torture.end()


def test_a_ledger_that_somebody_touched_is_seen(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(3):
        store.record("change-intent", {"number": number})
    entries = store.ledger()
    assert broken(entries) == []
    assert broken([entries[0], entries[2]]) != []
    entries[1]["detail"]["number"] = 7
    (found,) = broken(entries)
    assert found.startswith("the ledger breaks at entry 2")
