"""The stack as a value: what it admits, what changes, what its version is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patcher.engine.stack import Stack, admit
from patcher.errors import StackConflictError, UnknownPatchError
from patcher.patch import Base, Manifest, Method, ModuleBase, Requests

IDS = [f"{n:064x}" for n in range(8)]


def manifest(
    modules: Sequence[str] = ("m.0",),
    requires: Sequence[str] = (),
    conflicts: Sequence[str] = (),
) -> Manifest:
    entry = ModuleBase(shape=(2, 3), dtype="float32", digest="0" * 64, blocks=("0" * 64,) * 3)
    return Manifest(
        title="t",
        created="2026-11-24T00:00:00Z",
        tool="tests",
        base=Base(model="m", architecture="a", modules=dict.fromkeys(modules, entry)),
        method=Method(name="none", hyperparameters={}),
        requests=Requests(count=1, commitment="0" * 64),
        requires=list(requires),
        conflicts=list(conflicts),
    )


stacks = st.lists(st.sampled_from(IDS), unique=True).map(lambda ids: Stack(tuple(ids)))
targets = st.lists(st.sampled_from(["m.0", "m.1", "m.2"]), min_size=1, unique=True)
manifests = st.fixed_dictionaries({i: targets.map(manifest) for i in IDS})


@given(stacks, stacks)
def test_versions_tell_stacks_apart(one: Stack, other: Stack) -> None:
    assert (one.version == other.version) == (one == other)


def test_the_version_is_what_the_protocol_says() -> None:
    assert Stack().version == hashlib.sha256(b"").hexdigest()
    lines = f"{IDS[1]}\n{IDS[0]}\n".encode()
    assert Stack((IDS[1], IDS[0])).version == hashlib.sha256(lines).hexdigest()


@given(stacks, stacks, manifests)
def test_exactly_the_modules_with_another_list_of_patches_change(
    before: Stack, after: Stack, held: dict[str, Manifest]
) -> None:
    changed = before.changed_modules(after, held)
    for name in ("m.0", "m.1", "m.2"):
        one = [i for i in before.ids if name in held[i].base.modules]
        other = [i for i in after.ids if name in held[i].base.modules]
        assert (name in changed) == (one != other)
    assert before.changed_modules(before, held) == []


@given(stacks, manifests)
def test_any_order_of_independent_patches_is_admitted(
    stack: Stack, held: dict[str, Manifest]
) -> None:
    assert admit(stack.ids, held) == stack


def test_a_patch_twice() -> None:
    with pytest.raises(StackConflictError, match="twice"):
        admit([IDS[0], IDS[0]], {IDS[0]: manifest()})


def test_an_unknown_patch() -> None:
    with pytest.raises(UnknownPatchError):
        admit([IDS[0]], {})


def test_what_is_required_must_lie_below() -> None:
    held = {IDS[0]: manifest(), IDS[1]: manifest(requires=[IDS[0]])}
    assert admit([IDS[0], IDS[1]], held).ids == (IDS[0], IDS[1])
    for order in ([IDS[1]], [IDS[1], IDS[0]]):
        with pytest.raises(StackConflictError, match="requires"):
            admit(order, held)


def test_a_conflict_counts_from_either_side() -> None:
    held = {IDS[0]: manifest(conflicts=[IDS[1]]), IDS[1]: manifest()}
    for order in ([IDS[0], IDS[1]], [IDS[1], IDS[0]]):
        with pytest.raises(StackConflictError, match="conflicts"):
            admit(order, held)


def test_what_is_required_goes_only_together_with_what_stands_on_it() -> None:
    held = {
        IDS[0]: manifest(),
        IDS[1]: manifest(requires=[IDS[0]]),
        IDS[2]: manifest(requires=[IDS[0], IDS[1]]),
        IDS[3]: manifest(),
    }
    assert admit([IDS[0], IDS[3], IDS[1], IDS[2]], held)
    for left in ([IDS[1], IDS[2]], [IDS[0], IDS[2]], [IDS[3], IDS[2]]):
        with pytest.raises(StackConflictError, match=r"requires .* together"):
            admit(left, held)
    for left in ([IDS[0], IDS[1]], [IDS[0], IDS[3]], [IDS[3]]):
        assert admit(left, held).ids == tuple(left)
