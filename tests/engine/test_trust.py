"""An engine with a trust policy: what it keeps, refuses, and checks again at a start.

On a real one: ``test_operations.py``.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from patcher.engine.service import PatchService
from patcher.engine.signatures import MAX_SIGNATURES, Trust
from patcher.engine.store import Store
from patcher.errors import EngineRefusedError, InvalidPatchError, TrustError, UnknownPatchError
from tests.engine.test_faults import make, put
from tests.signing.reviewers import Reviewers
from tests.small_patch import small_patch


@pytest.fixture
def people(tmp_path: Path) -> Reviewers:
    return Reviewers(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "state")
    store.add_patch(small_patch(), "me")
    return store


def test_signatures_are_kept_with_the_patch(people: Reviewers, store: Store) -> None:
    patch = small_patch()
    trust = Trust(store, people.policy("", "alice"))
    alice, bob = people.bundle("alice", patch), people.bundle("bob", patch)
    assert trust.add(patch.id, alice, "me") == (True, "alice")
    assert trust.add(patch.id, alice, "me") == (False, "alice")
    assert trust.add(patch.id, bob, "me") == (True, None)
    assert set(Store(store.folder).signatures(patch.id)) == {alice, bob}
    events = [e["detail"] for e in store.ledger() if e["event"] == "signature-stored"]
    assert [e["signer"] for e in events] == ["alice", None]
    assert trust.check([patch.id]) == {patch.id: ["alice"]}


def test_a_signature_of_another_patch_is_not_kept(people: Reviewers, store: Store) -> None:
    trust = Trust(store, None)
    with pytest.raises(InvalidPatchError):
        trust.add(small_patch().id, people.bundle("alice", small_patch(1)), "me")
    with pytest.raises(UnknownPatchError):
        trust.add(small_patch(1).id, people.bundle("alice", small_patch(1)), "me")
    assert store.signatures(small_patch().id) == []


def test_somebody_floods_a_patch_with_signatures(people: Reviewers, store: Store) -> None:
    trust = Trust(store, None)
    bundle = people.bundle("alice", small_patch())
    for count in range(MAX_SIGNATURES):
        trust.add(small_patch().id, bundle + b" " * count, "me")
    with pytest.raises(EngineRefusedError, match="the most that are kept"):
        trust.add(small_patch().id, bundle + b" " * MAX_SIGNATURES, "me")
    assert len(store.signatures(small_patch().id)) == MAX_SIGNATURES


def test_what_is_in_force_may_be_reverted_when_its_signer_is_gone(
    people: Reviewers, service: PatchService, weights: list[torch.Tensor]
) -> None:
    """A policy that became stricter refuses starts and new patches, never a revert."""
    lower, upper = make(weights, 1), make(weights, 2)
    put(service, lower, upper)
    service.trust = Trust(service.store, people.policy("", "alice"))
    with pytest.raises(TrustError, match="--no-restore"):
        asyncio.run(service.restore())
    with pytest.raises(TrustError) as refused:
        put(service, lower, upper, make(weights, 3))
    assert refused.value.details["rule"] == "unsigned"
    assert service.store.in_force().ids == (lower.id, upper.id)
    put(service, upper)
    put(service)
    assert service.store.in_force().ids == ()
