"""An engine with a trust policy: what it refuses and records, and what a start checks again."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from patcher.client import Engine
from patcher.engine.service import PatchService
from patcher.engine.signatures import MAX_SIGNATURES, Trust
from patcher.engine.store import Store
from patcher.errors import EngineRefusedError, InvalidPatchError, TrustError, UnknownPatchError
from patcher.patch import Patch
from tests.engine.conftest import EAGER
from tests.engine.patches import random_patch
from tests.engine.server import Server
from tests.engine.test_faults import make, put
from tests.engine.test_refusals import patcher
from tests.engine.tiny import tiny_llama
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


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Server]:
    server = Server(tiny_llama(tmp_path / "model"), tmp_path / "server", EAGER)
    yield server
    server.kill(signal.SIGKILL)


@pytest.mark.engine
def test_an_engine_that_asks_for_two_signatures(
    mortal: Server, people: Reviewers, tmp_path: Path
) -> None:
    patch: Patch = random_patch(Path(mortal.model), 1, layers=(0, 3), scale=20.0)
    file = tmp_path / "p.st"
    patch.write(file)
    policy = people.policy("signatures = 2", "alice", "bob", "carol")
    mortal.start(PATCHER_TRUST=str(policy))

    def call(*words: str) -> tuple[int, dict[str, object]]:
        return patcher(*words, token=mortal.token, url=mortal.url)

    code, answer = call("apply", str(file))
    assert (code, answer["error"]["rule"]) == (5, "unsigned")  # type: ignore[index]
    (tmp_path / "p.st.alice.sig").write_bytes(people.bundle("alice", patch))
    code, answer = call("apply", str(file))
    assert (code, answer["error"]["rule"]) == (5, "signatures")  # type: ignore[index]
    with Engine(mortal.url, mortal.token) as engine:
        assert engine.status()["stack"] == []
        trust = engine.status()["trust"]
        assert trust is not None
        assert trust["signers"] == ["alice", "bob", "carol"]
    (tmp_path / "p.st.carol.sig").write_bytes(people.bundle("carol", patch))
    code, answer = call("apply", str(file))
    assert (code, answer.get("stack")) == (0, [patch.id])
    with Engine(mortal.url, mortal.token) as engine:
        assert len(engine.signatures(patch.id)) == 2
        (done,) = [e for e in engine.ledger() if e["event"] == "change-done"]
        assert done["detail"]["signers"] == {patch.id: ["alice", "carol"]}
        (started,) = [e for e in engine.ledger() if e["event"] == "start"]
        assert started["detail"]["trust"]["policy"] == trust["policy"]
    mortal.stop()

    people.policy(f'revoked-patches = ["{patch.id}"]', "alice", "bob", "carol")
    with pytest.raises(RuntimeError, match="revoked by the policy"):
        mortal.start(PATCHER_TRUST=str(policy))
