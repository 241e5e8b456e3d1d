"""An engine with a trust policy: what it keeps, refuses, and checks again at a start.

On a real one: ``test_operations.py``.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch

from patcher.engine.service import PatchService
from patcher.engine.signatures import MAX_SIGNATURES, Trust
from patcher.engine.store import Store
from patcher.errors import EngineRefusedError, InvalidPatchError, TrustError, UnknownPatchError
from tests.engine.test_faults import make, put
from tests.signing.reviewers import Reviewers
from tests.signing.test_trust_policy import claiming
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
    assert trust.add(patch.id, b" " + alice, "me") == (False, "alice")
    assert trust.add(patch.id, bob, "me") == (False, None), "nothing would ever come of it"
    (kept,) = Store(store.folder).signatures(patch.id)
    assert json.loads(kept) == json.loads(alice)
    (event,) = [e["detail"] for e in store.ledger() if e["event"] == "signature-stored"]
    assert event["signer"] == "alice"
    assert trust.check([patch.id]) == {patch.id: ["alice"]}


def test_without_a_policy_all_are_kept(people: Reviewers, store: Store) -> None:
    trust = Trust(store, None)
    for who in ("alice", "bob"):
        assert trust.add(small_patch().id, people.bundle(who, small_patch()), "me") == (True, None)
    stricter = Trust(store, people.policy("signatures = 2", "alice", "bob"))
    assert stricter.check([small_patch().id]) == {small_patch().id: ["alice", "bob"]}


def test_a_signature_of_another_patch_is_not_kept(people: Reviewers, store: Store) -> None:
    trust = Trust(store, None)
    with pytest.raises(InvalidPatchError):
        trust.add(small_patch().id, people.bundle("alice", small_patch(1)), "me")
    with pytest.raises(UnknownPatchError):
        trust.add(small_patch(1).id, people.bundle("alice", small_patch(1)), "me")
    assert store.signatures(small_patch().id) == []


def test_somebody_floods_a_patch_with_signatures(people: Reviewers, store: Store) -> None:
    """Strangers' are bounded, and don't take the place of a reviewer's."""
    patch, trust = small_patch(), Trust(store, None)
    claims = [claiming(patch.id, f',"n":{number}') for number in range(MAX_SIGNATURES + 1)]
    for claim in claims[:-1]:
        trust.add(patch.id, claim, "me")
    with pytest.raises(EngineRefusedError, match="the most that are kept"):
        trust.add(patch.id, claims[-1], "me")
    assert len(store.signatures(patch.id)) == MAX_SIGNATURES
    strict = Trust(store, people.policy("", "alice"))
    assert strict.add(patch.id, people.bundle("alice", patch), "me") == (True, "alice")
    assert strict.check([patch.id]) == {patch.id: ["alice"]}


def test_somebody_signs_badly_what_may_be_unsigned(
    people: Reviewers, service: PatchService, weights: list[torch.Tensor]
) -> None:
    """A start must not hang on what any token may store."""
    patch = make(weights, 1)
    put(service, patch)
    service.trust.add(patch.id, claiming(patch.id), "anybody")
    service.trust = Trust(service.store, people.policy("unsigned = true", "alice"))
    service.trust.add(patch.id, claiming(patch.id, ',"n":1'), "anybody")
    asyncio.run(service.restore())
    assert service.store.in_force().ids == (patch.id,)


def test_two_of_three_reviewers_must_have_signed(
    people: Reviewers, service: PatchService, weights: list[torch.Tensor]
) -> None:
    patch = make(weights, 1)
    policy = people.policy("signatures = 2", "alice", "bob", "carol")
    service.trust = Trust(service.store, policy)
    service.store.add_patch(patch, "me")
    for who, rule in (("alice", "unsigned"), ("carol", "signatures")):
        with pytest.raises(TrustError) as refused:
            put(service, patch)
        assert refused.value.details["rule"] == rule
        service.trust.add(patch.id, people.bundle(who, patch), "me")
    put(service, patch)
    done = service.store.ledger()[-1]["detail"]
    assert done["signers"] == {patch.id: ["alice", "carol"]}


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
