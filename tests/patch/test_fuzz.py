"""The reader on what was found by fuzzing, and on a sample of what is made for it.

`make fuzz` runs a million inputs (docs/fuzzing.md); this is what of it a suite has time for.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patcher.errors import InvalidPatchError
from patcher.patch import Patch

from . import making, mutations
from .mutations import CORPUS

KEPT = sorted(CORPUS.iterdir())


def test_replays_what_reached_new_code() -> None:
    assert len(KEPT) > 50
    assert sum(path.stat().st_size for path in KEPT) < 1 << 20, "kept in git: small files only"
    for path in KEPT:
        try:
            mutations.holds(path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{path.name}: {error!r}") from error


def test_the_corpus_has_what_is_read_and_what_is_refused_at_every_stage() -> None:
    words = set()
    read = 0
    for path in KEPT:
        try:
            Patch.from_bytes(path.read_bytes())
            read += 1
        except InvalidPatchError as error:
            words.add(error.message.split(":")[0][:30])
    assert read >= 3
    assert len(words) >= 10


@settings(max_examples=400)
@given(st.integers(0, 2**40), st.sampled_from(mutations.seeds()))
def test_changes_a_file_where_it_hurts(seed: int, data: bytes) -> None:
    draw = Random(seed)
    mutations.holds(mutations.mutate(data, draw, mutations.noise(draw)))


def test_the_changes_get_past_the_header() -> None:
    """A mutator that only breaks the container would find nothing in what lies behind it."""
    read, words = 0, set()
    for seed in range(400):
        draw = Random(seed)
        data = mutations.mutate(making.small().data, draw, mutations.noise(draw))
        try:
            Patch.from_bytes(data)
            read += 1
        except InvalidPatchError as error:
            words.add(error.message)
    assert read > 10
    for stage in ("header", "manifest", "tensor", "not finite", "blow the weight up"):
        assert any(stage in word for word in words), stage


def test_a_reader_that_does_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    data = making.small().data
    assert mutations.holds(data)
    assert not mutations.holds(data[:-1])
    with monkeypatch.context() as patch:
        patch.setattr(Patch, "from_bytes", lambda data: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            mutations.holds(data)
    other = Patch.build(
        making.small().manifest.model_copy(update={"title": "x"}), making.small().deltas
    )
    with monkeypatch.context() as patch:
        patch.setattr(Patch, "build", lambda *_: other)
        with pytest.raises(AssertionError, match="written otherwise"):
            mutations.holds(data)


def test_the_million_is_a_target_of_make() -> None:
    root = Path(__file__).parents[2]
    assert "bench.fuzz" in (root / "Makefile").read_text(encoding="utf-8")
    assert json.dumps("fuzz =")[1:-1] in (root / "pyproject.toml").read_text(encoding="utf-8")
