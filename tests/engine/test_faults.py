"""Whatever fails in a change: the stack before is in force, and the engine never runs a mixture.

The transaction and the worker code are the real ones; only vLLM is played, because a real one
can't be made to fail at a chosen point. ``tests/engine/test_live.py`` has the real one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from patcher.engine import transition as transition_module
from patcher.engine import vllm_client, vllm_worker
from patcher.engine.outcome import Outcome
from patcher.engine.service import PatchService
from patcher.engine.sites import TensorStaged
from patcher.engine.stack import Stack
from patcher.engine.store import Store
from patcher.engine.worker import RankState
from patcher.errors import (
    BaseMismatchError,
    EngineRefusedError,
    StackChangedError,
    StackConflictError,
    StackRacedError,
)
from patcher.kernels import fold
from patcher.patch import Base, Delta, Manifest, Method, Patch, Requests, module_base
from tests.engine.fake_vllm import D_OUT, RANKS, FakeClient

T = TypeVar("T")


def make(weights: list[torch.Tensor], seed: int, layers: tuple[int, ...] = (0, 1)) -> Patch:
    draw = np.random.default_rng(seed)
    manifest = Manifest(
        title=f"edit {seed}",
        created="2026-11-24T00:00:00Z",
        tool="tests",
        base=Base(
            model="m",
            architecture="a",
            modules={f"layers.{i}": module_base(weights[i]) for i in layers},
        ),
        method=Method(name="random", hyperparameters={}),
        requests=Requests(count=1, commitment="0" * 64),
    )
    deltas = {
        f"layers.{i}": Delta.multiplicative(
            draw.standard_normal((D_OUT, 2)), draw.standard_normal((2, D_OUT))
        )
        for i in layers
    }
    return Patch.build(manifest, deltas)


def folded(weights: list[torch.Tensor], *patches: Patch) -> list[torch.Tensor]:
    return [
        fold(w, [p.deltas[f"layers.{i}"].to_torch() for p in patches if f"layers.{i}" in p.deltas])
        for i, w in enumerate(weights)
    ]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def run(doing: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(doing)


def put(service: PatchService, *patches: Patch, in_flight: Any = "recompute") -> Any:
    return run(change(service, *patches, in_flight=in_flight))


async def change(
    service: PatchService, *patches: Patch, in_flight: Any = "recompute", settle: bool = True
) -> Any:
    for patch in patches:
        service.store.add_patch(patch, "me")
    done = await service.change(
        [p.id for p in patches],
        if_match=service.store.in_force().version,
        in_flight=in_flight,
        actor="me",
    )
    if settle:  # else what is left to do ends with the loop
        await service.transition.settle()
    return done


def boom(*_: object) -> None:
    raise RuntimeError("out of memory")


FULL = EngineRefusedError("database or disk is full")


def fails(error: Exception = FULL) -> Any:
    """What raises that, whatever it is called with."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def refuse(worker: Any, nonce: str, *_: object) -> dict[str, Any]:
    failure = {"error": "internal", "detail": "out of memory", "cure": ""}
    return {"nonce": nonce, "rank": worker.rank, "pid": 0, "ok": False, **failure}


def test_two_ranks_serve_the_shards_of_the_fold(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    a, b = make(weights, 1), make(weights, 2, (1, 2))
    put(service, a, b)
    assert same(client.live(), folded(weights, a, b))
    assert run(service.verify())["ok"]
    put(service, b)
    assert same(client.live(), folded(weights, b))
    put(service)
    assert same(client.live(), weights)
    assert run(service.verify())["ok"]


def test_of_two_changes_at_once_one_wins_and_the_other_learns_what_is_in_force(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    patches = [make(weights, seed) for seed in (1, 2, 3)]
    for patch in patches:
        service.store.add_patch(patch, "me")

    async def at_once() -> list[Any]:
        base = Stack().version
        wishes = [
            service.change([p.id], if_match=base, in_flight="recompute", actor="me")
            for p in patches
        ]
        return await asyncio.gather(*wishes, return_exceptions=True)

    ended = run(at_once())
    (winner,) = [n for n, one in enumerate(ended) if isinstance(one, Outcome)]
    won = ended.pop(winner)
    assert won.stack == Stack((patches[winner].id,))
    for error in ended:
        assert type(error) is StackRacedError
        assert error.http_status == 409
        assert error.details["stack"] == [patches[winner].id]
        assert error.details["weight_version"] == won.stack.version
    assert same(client.live(), folded(weights, patches[winner]))


def test_a_wish_that_was_out_of_date_when_it_came_is_told_so(
    service: PatchService, weights: list[torch.Tensor]
) -> None:
    put(service, make(weights, 1))
    with pytest.raises(StackChangedError) as caught:
        run(
            service.change(
                [], if_match=Stack(("f" * 64,)).version, in_flight="recompute", actor="me"
            )
        )
    assert caught.value.http_status == 412
    assert caught.value.details["stack"] == list(service.store.in_force().ids)


@pytest.mark.parametrize("step", ["receive", "begin", "stage", "commit", "check"])
@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("how", [refuse, boom])
def test_a_rank_that_fails_takes_the_others_back(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    step: str,
    rank: int,
    how: Any,
) -> None:
    a, b = make(weights, 1), make(weights, 2)
    put(service, a)
    client.resumed.clear()
    client.fail[(f"patcher_{step}", rank)] = how
    with pytest.raises(EngineRefusedError, match="out of memory"):
        put(service, a, b)
    client.fail.clear()
    before, after = folded(weights, a), folded(weights, a, b)
    assert same(client.live(), before)
    assert not client.stopped
    assert all(same(seen, before) for seen in client.resumed)
    assert service.store.committed() == Stack((a.id,))
    assert service.store.ledger()[-1]["event"] == "change-failed"
    assert run(service.verify())["ok"]
    put(service, a, b)
    assert same(client.live(), after)


def test_a_weight_that_fails_half_way_is_put_back(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commits = 0
    plain = vllm_worker.TensorStaged._write

    def write(self: Any, weight: torch.Tensor) -> None:
        nonlocal commits
        commits += 1
        plain(self, weight)
        if commits == 2:
            raise RuntimeError("device lost")

    monkeypatch.setattr(vllm_worker.TensorStaged, "_write", write)
    with pytest.raises(EngineRefusedError, match="device lost"):
        put(service, make(weights, 1))
    assert same(client.live(), weights)
    assert all(same(seen, weights) for seen in client.resumed)


@pytest.mark.parametrize("answer", [False, RuntimeError("blocks are held")])
def test_a_flush_that_fails_is_a_failure(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor], answer: Any
) -> None:
    client.flushes = [answer]
    with pytest.raises(EngineRefusedError):
        put(service, make(weights, 1))
    assert same(client.live(), weights)
    assert all(same(seen, weights) for seen in client.resumed)
    assert client.log[-3:] == ["roll_back", "flush", "resume"], "what the new weights cached goes"


def test_while_nothing_can_be_put_back_the_engine_stands_still(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    patch = make(weights, 1)
    client.flushes = [False, False]
    with pytest.raises(EngineRefusedError):
        put(service, patch)
    assert client.stopped
    assert run(service.status())["engine"]["state"] == "changing"
    assert client.resumed == []
    put(service, patch)  # the next change mends it first
    assert not client.stopped
    assert same(client.live(), folded(weights, patch))


def test_a_disk_that_fails_at_the_end_takes_the_weights_back(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch = make(weights, 1)
    service.store.add_patch(patch, "me")
    monkeypatch.setattr(service.store, "commit", fails())
    with pytest.raises(EngineRefusedError, match="full"):
        put(service, patch)
    assert same(client.live(), weights)
    assert service.store.committed() == Stack()


def test_a_refused_patch_does_not_stop_the_engine(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    foreign = make([w + 1 for w in weights], 1)
    with pytest.raises(BaseMismatchError):
        put(service, foreign)
    assert not any(entry.startswith("pause") for entry in client.log)


def test_a_refused_patch_does_not_disturb_verify(
    service: PatchService, weights: list[torch.Tensor]
) -> None:
    with pytest.raises(BaseMismatchError):
        put(service, make([w + 1 for w in weights], 1))
    assert run(service.verify())["ok"]
    put(service, make(weights, 2))
    assert run(service.verify())["ok"]


def test_a_rank_that_never_answers_does_not_hold_the_caller(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_client, "RPC_DEADLINE", 0.05)
    client.hangs = {"patcher_stage"}
    with pytest.raises(EngineRefusedError, match="did not answer patcher_stage"):
        put(service, make(weights, 1))
    client.hangs = set()
    monkeypatch.setattr(vllm_client, "RPC_DEADLINE", 60.0)
    assert service.store.in_force() == Stack()
    assert same(client.live(), weights)
    put(service, make(weights, 1))
    assert run(service.verify())["ok"]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA: 2 GiB. More")])
def test_a_rank_without_memory_says_which_it_is(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fold_fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("patcher.engine.sites.fold", fold_fails)
    with pytest.raises(EngineRefusedError, match=r"Rank 0: This rank ran out of memory") as caught:
        put(service, make(weights, 1))
    assert "Free memory" in caught.value.cure
    assert same(client.live(), weights)


def test_a_change_that_is_cancelled_while_it_is_recorded_is_made(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, begun = service.store.commit, threading.Event()

    def slowly(*args: Any, **options: Any) -> None:
        begun.set()
        time.sleep(0.2)
        plain(*args, **options)

    async def cancel() -> None:
        patch = make(weights, 1)
        service.store.add_patch(patch, "me")
        change = service.change(
            [patch.id], if_match=Stack().version, in_flight="recompute", actor="me"
        )
        task = asyncio.ensure_future(change)
        while not begun.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])

    monkeypatch.setattr(service.store, "commit", slowly)
    run(cancel())
    assert service.store.in_force() == Stack((make(weights, 1).id,))
    assert same(client.live(), folded(weights, make(weights, 1)))
    assert run(service.verify())["ok"]


def test_drain_gives_up_and_lets_the_engine_go_on(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transition_module, "DRAIN_DEADLINE", 0.05)
    client.drains = False
    with pytest.raises(EngineRefusedError, match="did not end"):
        put(service, make(weights, 1), in_flight="drain")
    assert not client.stopped
    assert same(client.live(), weights)
    client.drains = True
    put(service, make(weights, 1), in_flight="drain")


def test_an_engine_that_the_operator_paused_stays_paused(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    client.stopped = True
    put(service, make(weights, 1))
    assert client.stopped


def test_finish_that_is_lost_does_not_undo_a_change(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    a, b = make(weights, 1), make(weights, 2)
    client.fail[("patcher_finish", 1)] = boom
    put(service, a)
    assert same(client.live(), folded(weights, a))
    client.fail.clear()
    put(service, a, b)
    assert same(client.live(), folded(weights, a, b))


def test_done_is_told_before_the_ranks_have_let_go(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    """The first steps after a flush compute whole contexts, and a rank answers after one."""
    a, b = make(weights, 1), make(weights, 2)
    client.hangs = {"patcher_finish"}
    run(asyncio.wait_for(change(service, a, settle=False), 10))
    assert all(worker._patcher_state.change is not None for worker in client.workers)
    assert run(service.verify())["ok"]
    client.hangs = set()
    put(service, a, b)
    assert same(client.live(), folded(weights, a, b))
    for worker in client.workers:
        state: RankState = worker._patcher_state
        assert (state.change, sorted(state.patches)) == (None, sorted((a.id, b.id)))


def test_an_end_that_comes_late_takes_nothing_from_the_next_change(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    """Another API server has ended the change by then, and sends what its own needs."""
    a, b = make(weights, 1), make(weights, 2)
    put(service, a)
    state: RankState = client.workers[0]._patcher_state
    state.patches[b.id] = b
    state.finish(state.ended)
    assert b.id in state.patches
    state.finish("of a change that never began")
    assert list(state.patches) == [a.id]


def test_what_was_not_read_back_is_not_put_in_force(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    def silent(worker: Any, nonce: str, *_: object) -> dict[str, Any]:
        return {"nonce": nonce, "rank": worker.rank, "pid": 0, "ok": True}

    client.fail[("patcher_check_staged", 1)] = silent
    with pytest.raises(EngineRefusedError, match=r"Rank 1: .* layers.0 was not read back"):
        put(service, make(weights, 1))
    assert same(client.live(), weights)


def test_what_was_staged_is_read_back(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TensorStaged, "read", lambda staged: staged._spare + 1)
    with pytest.raises(EngineRefusedError, match=r"staged for layers.0 reads back differently"):
        put(service, make(weights, 1))
    assert same(client.live(), weights)
    assert "pause keep" not in client.log


def test_a_restart_restores_what_was_committed(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    patch = make(weights, 1)
    put(service, patch)
    fresh = FakeClient(weights, RANKS)
    restarted = PatchService(fresh, Store(service.store.folder))
    run(restarted.restore())
    assert same(fresh.live(), folded(weights, patch))
    assert fresh.version == Stack((patch.id,)).version
    assert restarted.store.ledger()[-1]["event"] == "start-restored"


def test_an_interrupted_change_is_told_and_undone(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    patch = make(weights, 1)
    service.store.add_patch(patch, "me")
    intent = {"change": "c", "before": [], "after": [patch.id]}
    service.store.record("change-intent", intent)
    run(service.restore())
    assert same(client.live(), weights)
    assert [e["event"] for e in service.store.ledger()][-1] == "change-interrupted"


def test_what_a_dead_api_server_left_behind_is_mended(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    a, b = make(weights, 1), make(weights, 2)
    put(service, a)
    # Another API server died after its commit: weights are B's, the record says A.
    for worker in client.workers:
        state: RankState = worker._patcher_state
        state.patches[b.id] = b
        state.begin("orphan", (b.id,))
        for name in ("layers.0", "layers.1"):
            state.stage("orphan", name)
            state.check_staged("orphan", name)
        state.commit("orphan")
    c = make(weights, 3, (2,))
    put(service, a, c)
    assert same(client.live(), folded(weights, a, c))


def test_reverting_all_after_a_start_without_restore_is_durable(
    service: PatchService, weights: list[torch.Tensor]
) -> None:
    patch = make(weights, 1)
    put(service, patch)
    service.store.suspend(True, "start-without-restore", {})
    restarted = PatchService(FakeClient(weights, RANKS), service.store)
    run(restarted.restore())
    assert run(restarted.status())["stack"] == []
    put(restarted)
    assert restarted.store.committed() == Stack()


def test_an_id_twice(service: PatchService, weights: list[torch.Tensor]) -> None:
    patch = make(weights, 1)
    with pytest.raises(StackConflictError):
        put(service, patch, patch)


def test_a_worker_without_the_plugin_is_named(service: PatchService, client: FakeClient) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("'CPUWorker' object has no attribute 'patcher_probe'")

    client.fail[("patcher_probe", 1)] = missing
    with pytest.raises(EngineRefusedError, match="don't have the plugin"):
        run(service.status())


def test_replies_out_of_step_are_refused(service: PatchService, client: FakeClient) -> None:
    late = {"nonce": "another", "rank": 1, "pid": 0, "ok": True}
    client.fail[("patcher_probe", 1)] = lambda *_: late
    with pytest.raises(EngineRefusedError, match="out of step"):
        run(service.status())
