"""Several patches as one, against the fold and the algebra; and what differs between two."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patcher.errors import (
    BaseMismatchError,
    InvalidPatchError,
    StackConflictError,
    UsageError,
)
from patcher.kernels import fold
from patcher.patch import Delta, Patch, Requests
from patcher.patch.compare import Statistics
from patcher.patch.difference import difference
from patcher.patch.merge import merge
from tests.cli.running import document, run
from tests.patch.test_compare import IN, D, M, N, delta, drawn, patch, statistics

seeds = st.integers(0, 10**6)
kinds = st.sampled_from(["multiplicative", "additive"])


def product(one: Delta) -> np.ndarray[Any, np.dtype[np.float64]]:
    return one.left.astype(np.float64) @ one.right.astype(np.float64)


def gentle(draw: np.random.Generator, kind: str) -> Delta:
    """One of which four together stay within the bound on a patch's gain."""
    one = delta(draw, 2, kind)
    make = Delta.multiplicative if kind == "multiplicative" else Delta.additive
    return make(one.left * 0.2, one.right)


def folded(weight: torch.Tensor, patches: list[Patch], name: str = M) -> torch.Tensor:
    return fold(weight, [p.deltas[name].to_torch() for p in patches if name in p.deltas])


@given(seeds, kinds, st.integers(2, 4))
def test_a_merge_does_what_the_stack_does(seed: int, kind: str, count: int) -> None:
    draw = drawn(seed)
    stack = [patch(f"p{i}", deltas={M: gentle(draw, kind)}) for i in range(count)]
    merged = merge(stack)
    weight = torch.from_numpy(draw.normal(size=(D, IN))).float()
    together, one = folded(weight, stack), folded(weight, [merged.patch])
    assert torch.allclose(one, together, rtol=1e-5, atol=1e-5 * float(together.abs().max()))
    most = D if kind == "multiplicative" else min(D, IN)
    assert merged.modules[M] == {"rank": min(most, 2 * count), "of": 2 * count, "error": 0.0}


@given(seeds, kinds, st.integers(1, 5), st.booleans())
def test_the_error_of_a_lower_rank_is_the_one_that_is_told(
    seed: int, kind: str, rank: int, whitened: bool
) -> None:
    draw = drawn(seed)
    stack = [patch(f"p{i}", deltas={M: delta(draw, 3, kind)}) for i in range(2)]
    under = statistics(draw) if whitened else None
    given_statistics = None if under is None else {M: under}
    merged = merge(stack, rank=rank, statistics=given_statistics)
    whole, cut = product(merge(stack).patch.deltas[M]), product(merged.patch.deltas[M])
    root = root_of(kind, under)
    lost = np.linalg.norm((whole - cut) @ root) / np.linalg.norm(whole @ root)
    assert merged.modules[M]["error"] == pytest.approx(lost, rel=1e-3, abs=1e-5)
    assert merged.whitened == whitened
    # By Eckart and Young: no matrix of that rank comes nearer.
    values = np.linalg.svd(whole @ root, compute_uv=False)
    least = np.sqrt(np.sum(values[rank:] ** 2) / np.sum(values**2))
    assert lost == pytest.approx(least, rel=1e-3, abs=1e-5)


def root_of(kind: str, under: Statistics | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    if under is None:
        return np.eye(D if kind == "multiplicative" else IN)
    read = under.weight @ under.moment @ under.weight.T
    values, vectors = np.linalg.eigh(read if kind == "multiplicative" else under.moment)
    root: np.ndarray[Any, np.dtype[np.float64]] = vectors * np.sqrt(np.maximum(values, 0))
    return root


def test_the_manifest_says_what_it_is_made_of() -> None:
    draw = drawn(1)
    below = patch("below", deltas={M: delta(draw)}, conflicts=("a" * 64,))
    above = patch("above", deltas={M: delta(draw), N: delta(draw)}, requires=(below.id, "b" * 64))
    merged = merge([below, above]).patch.manifest
    assert merged.requires == ("b" * 64,)
    assert merged.conflicts == ("a" * 64,)
    assert merged.requests.count == sum(p.manifest.requests.count for p in (below, above))
    parts = "".join(f"{p.manifest.requests.commitment}\n" for p in (below, above))
    assert merged.requests.commitment == hashlib.sha256(parts.encode()).hexdigest()
    assert merged.method.hyperparameters["of"] == [below.id, above.id]
    assert set(merged.base.modules) == {M, N}


def test_what_can_not_be_merged() -> None:
    draw = drawn(2)
    one = patch("one", deltas={M: delta(draw)})
    with pytest.raises(UsageError, match="nothing to merge"):
        merge([one])
    with pytest.raises(UsageError, match="twice"):
        merge([one, one])
    with pytest.raises(UsageError, match="title"):
        merge([one, patch("two", deltas={M: delta(draw)})], title="a\x1b[2J")
    with pytest.raises(UsageError, match="no single one"):
        merge([one, patch("other kind", deltas={M: delta(draw, 2, "additive")})])
    with pytest.raises(BaseMismatchError):
        merge([one, patch("other weights", 2, deltas={M: delta(draw)})])
    upper = patch("upper", deltas={M: delta(draw)}, requires=(one.id,))
    with pytest.raises(StackConflictError, match="below"):
        merge([upper, one])
    with pytest.raises(StackConflictError, match="conflicts"):
        merge([one, patch("enemy", deltas={M: delta(draw)}, conflicts=(one.id,))])


def test_one_conflicts_with_what_another_requires() -> None:
    draw, absent = drawn(6), "e" * 64
    needs = patch("needs", deltas={M: delta(draw)}, requires=(absent,))
    hates = patch("hates", deltas={M: delta(draw)}, conflicts=(absent,))
    for pair in ((needs, hates), (hates, needs)):
        with pytest.raises(StackConflictError, match="another requires") as caught:
            merge(pair)
        assert hates.id[:12] in caught.value.message
        assert caught.value.cure


def test_together_they_are_more_than_a_manifest_holds() -> None:
    draw = drawn(7)
    many = [tuple(f"{n:064x}" for n in range(start, start + 4096)) for start in (1, 5000)]
    stack = [patch(f"p{n}", deltas={M: delta(draw)}, requires=ids) for n, ids in enumerate(many)]
    with pytest.raises(InvalidPatchError, match="requires") as caught:
        merge(stack)
    assert caught.value.cure
    most = [
        patch(
            f"q{n}",
            deltas={M: delta(draw)},
            requests=Requests(count=2**53 - 1, commitment="0" * 64),
        )
        for n in range(2)
    ]
    with pytest.raises(InvalidPatchError, match="count"):
        merge(most)


def test_together_they_blow_a_weight_up() -> None:
    loud = Delta.multiplicative(np.eye(D), np.eye(D) * 40)
    with pytest.raises(InvalidPatchError, match=M):
        merge([patch("one", deltas={M: loud}), patch("two", deltas={M: loud})])


# -- what differs --------------------------------------------------------------------------------


@given(seeds, kinds)
def test_the_same_edit_factored_otherwise_is_no_distance_apart(seed: int, kind: str) -> None:
    draw = drawn(seed)
    one = delta(draw, 2, kind)
    turn = np.array([[2.0, 0.0], [0.0, -0.5]])
    make = Delta.multiplicative if kind == "multiplicative" else Delta.additive
    other = make(one.left @ turn, np.linalg.inv(turn) @ one.right)
    found = difference(patch(deltas={M: one}), patch(deltas={M: other})).modules[M]
    assert found.distance == pytest.approx(0, abs=1e-6)
    assert found.same_base
    far = difference(patch(deltas={M: one}), patch(deltas={M: delta(draw, 3, kind)})).modules[M]
    assert far.distance is not None
    assert far.distance > 0.1


def test_fields_and_modules_that_differ() -> None:
    draw = drawn(3)
    same = delta(draw)
    first = patch("first", deltas={M: same, N: delta(draw)})
    second = patch("second", 2, deltas={M: same})
    found = difference(first, second)
    assert found.fields == {"title": ("first", "second")}
    assert found.modules[M].distance == 0
    assert found.modules[M].same_base is False
    assert found.modules[N].second is None
    assert found.modules[N].distance is None
    assert not found.same
    assert difference(first, first).same


def test_the_same_edit_of_other_weights_or_stored_otherwise_is_not_the_same(tmp_path: Path) -> None:
    one = Delta.multiplicative(np.eye(D)[:, :2], np.eye(D)[:2], "F32")
    first = patch(deltas={M: one})
    others = {
        "DIFFERENT": patch("t", 2, deltas={M: one}),
        "BF16": patch(deltas={M: Delta.multiplicative(one.left, one.right, "BF16")}),
    }
    first.write(tmp_path / "first.st")
    for word, other in others.items():
        found = difference(first, other)
        assert found.fields == {}
        assert found.modules[M].distance == 0
        assert not found.same
        other.write(tmp_path / "other.st")
        words = ("diff", tmp_path / "first.st", tmp_path / "other.st")
        assert document(run(*words, "--json"))["same"] is False
        assert word in run(*words).stdout


# -- the commands --------------------------------------------------------------------------------


def test_merge_and_diff_as_commands(tmp_path: Path) -> None:
    draw = drawn(4)
    paths = [tmp_path / f"{i}.st" for i in range(2)]
    for i, path in enumerate(paths):
        patch(f"p{i}", deltas={M: delta(draw)}).write(path)
    out = tmp_path / "m.st"
    told = document(run("merge", *paths, "-o", out, "--rank", 3, "--json"))
    assert told["id"] == Patch.read(out).id
    assert told["modules"][M]["rank"] == 3
    assert 0 < told["error"] == told["modules"][M]["error"] < 1
    assert "rank" in run("merge", *paths, "-o", out).stdout
    found = document(run("diff", *paths, "--json"))
    assert found["fields"]["title"] == ["p0", "p1"]
    assert found["modules"][M]["distance"] > 0
    assert run("diff", paths[0], paths[0]).stdout == "They are the same.\n"
    assert "title" in run("diff", *paths).stdout


def test_a_damaged_file_is_among_those_to_merge(tmp_path: Path) -> None:
    good, bad, out = (tmp_path / name for name in ("good.st", "bad.st", "out.st"))
    made = patch("good", deltas={M: delta(drawn(5))})
    made.write(good)
    bad.write_bytes(made.data[:-1])
    assert run("merge", good, bad, "-o", out).exit_code == 3
    nowhere = tmp_path / "nowhere" / "m.st"
    for words in (("merge", good, bad), ("rebase", bad, "--onto", tmp_path)):
        assert run(*words, "-o", nowhere).exit_code == 2, "told before anything is read"
    assert not out.exists()
    assert run("diff", good, bad).exit_code == 3
