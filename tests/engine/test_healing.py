"""Weights that something else changed: seen, and healed or refused. What health says of it."""

from __future__ import annotations

import pytest
import torch

from patcher.engine.service import PatchService
from patcher.engine.stack import Stack
from patcher.engine.worker import RankState
from patcher.errors import EngineRefusedError, VerificationError
from tests.engine.fake_vllm import D_IN, RANKS, FakeClient
from tests.engine.test_faults import folded, make, put, refuse, run, same


def reload(client: FakeClient, layer: int, weight: torch.Tensor, ranks: range) -> None:
    """Put ``weight`` in place behind the worker code's back."""
    width = D_IN // RANKS
    for rank in ranks:
        part = weight[:, rank * width : (rank + 1) * width]
        client.workers[rank].model.layers[layer].weight.copy_(part)


@pytest.mark.parametrize("ranks", [range(RANKS), range(1)], ids=["all", "one"])
def test_a_base_that_somebody_else_reloaded_is_seen_and_healed_before_a_change(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor], ranks: range
) -> None:
    a, b = make(weights, 1, (0,)), make(weights, 2, (1,))
    put(service, a)
    reload(client, 0, weights[0], ranks)
    assert not run(service.verify())["ok"]
    assert run(service.health()) == ["drift"]
    put(service, a, b)
    assert same(client.live(), folded(weights, a, b))
    assert run(service.health()) == []
    events = [entry["event"] for entry in service.store.ledger()]
    assert events[-4:] == ["change-intent", "drift-healed", "drift-gone", "change-done"]


def test_weights_that_are_neither_the_fold_nor_the_base_are_refused(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    a, b = make(weights, 1, (0,)), make(weights, 2, (1,))
    put(service, a)
    reload(client, 0, weights[0] + 1, range(1, 2))
    for change in (lambda: put(service, a, b), lambda: run(service.heal())):
        with pytest.raises(VerificationError, match=r"layers\.0") as caught:
            change()
        assert caught.value.details["modules"] == ["layers.0"]
    assert run(service.health()) == ["drift"]
    assert service.store.committed() == Stack((a.id,))
    assert not same(client.live(), folded(weights, a))  # what is not ours is not overwritten


def test_a_heal_that_fails_is_tried_again(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    a = make(weights, 1, (0,))
    put(service, a)
    reload(client, 0, weights[0], range(RANKS))
    client.fail["patcher_commit", 1] = refuse
    with pytest.raises(EngineRefusedError, match="out of memory"):
        run(service.heal())
    client.fail.clear()
    assert run(service.health()) == ["drift"]
    assert run(service.heal())["ok"]
    assert same(client.live(), folded(weights, a))
    assert run(service.health()) == []


def test_health_names_what_is_wrong(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    put(service, make(weights, 1))
    client.fail["patcher_probe", 1] = refuse
    assert run(service.health()) == ["no-answer"]
    client.fail.clear()
    state: RankState = client.workers[1]._patcher_state  # type: ignore[attr-defined]
    state.stack = ()
    assert run(service.health()) == ["ranks-disagree"]
    with service.store.exclusive():  # somebody changes the stack at this moment
        assert run(service.health()) == []
    service.store.set_unclean(True)
    assert run(service.health()) == ["rollback-incomplete", "ranks-disagree"]
