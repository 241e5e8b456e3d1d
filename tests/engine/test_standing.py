"""Stops that don't end, disks that fail in the midst of them, engines that sleep: what is told.

Played as in ``tests/engine/test_faults.py``.
"""

from __future__ import annotations

import asyncio
import math
import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from starlette.datastructures import State

from patcher.engine import folder as folder_module
from patcher.engine import plugin, vllm_client
from patcher.engine.metrics import metrics
from patcher.engine.routes import PluginState
from patcher.engine.service import PatchService
from patcher.engine.stack import Stack
from patcher.engine.store import Store
from patcher.errors import EngineRefusedError, PatcherError, StackConflictError, UsageError
from tests.engine.fake_vllm import FakeClient
from tests.engine.test_faults import FULL, boom, change, fails, folded, make, put, run, same
from tests.engine.test_healing import RANKS, reload


def test_a_disk_that_takes_nothing_more_keeps_no_weight_from_its_place(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch = make(weights, 1)
    service.store.add_patch(patch, "me")
    with monkeypatch.context() as full:
        full.setattr(service.store, "commit", fails())
        full.setattr(service.store, "set_unclean", fails())
        with pytest.raises(EngineRefusedError, match="full"):
            put(service, patch)
    assert same(client.live(), weights)
    assert not client.stopped
    put(service, patch)
    assert same(client.live(), folded(weights, patch))


def test_a_rollback_that_fails_is_told_with_what_led_to_it_and_mended_by_the_next_change(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch = make(weights, 1)
    with monkeypatch.context() as full:
        full.setattr(service.store, "commit", fails())
        full.setattr(service.store, "set_unclean", fails())  # nothing on disk tells of the stop
        client.fail[("patcher_roll_back", 1)] = boom
        with pytest.raises(EngineRefusedError, match="could not be put back") as caught:
            put(service, patch)
    assert "full" in caught.value.message
    assert caught.value.details["stands_still"]
    assert client.stopped
    assert run(service.health()) == ["rollback-incomplete", "ranks-disagree"]
    assert run(service.status())["engine"]["state"] == "changing"
    (failed,) = [e["detail"] for e in service.store.ledger() if e["event"] == "change-failed"]
    assert (failed["cause"], failed["stands_still"]) == ("engine-refused", True)
    client.fail.clear()
    put(service, patch)
    assert not client.stopped, "our own stop is not taken for the operator's"
    assert same(client.resumed[-2], weights), "it goes on with what was in force"
    assert same(client.live(), folded(weights, patch))
    assert run(service.health()) == []


def test_an_engine_that_does_not_go_on_does_so_after_the_next_change(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch = make(weights, 1)
    with monkeypatch.context() as lost:
        lost.setattr(client, "resume_generation", fails(RuntimeError("core is gone")))
        with pytest.raises(EngineRefusedError, match="core is gone") as caught:
            put(service, patch)
    assert caught.value.details["stands_still"]
    assert client.stopped
    assert service.store.committed() == Stack()
    put(service, patch)
    assert not client.stopped
    assert same(client.live(), folded(weights, patch))


def test_another_api_server_mends_what_one_could_not(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch, other = make(weights, 1), PatchService(client, Store(service.store.folder))
    with monkeypatch.context() as lost:
        lost.setattr(client, "resume_generation", fails(RuntimeError("core is gone")))
        with pytest.raises(EngineRefusedError, match="did not go on"):
            put(service, patch)
    assert run(other.health()) == ["rollback-incomplete", "ranks-disagree"]
    put(other, patch)
    assert not client.stopped
    assert run(service.health()) == run(other.health()) == []
    client.stopped = True  # by the operator
    put(service)
    assert client.stopped, "that is nobody's stop of ours"


def test_what_came_first_is_told_where_the_engine_does_not_go_on(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client.fail[("patcher_commit", 1)] = boom
    monkeypatch.setattr(client, "resume_generation", fails(RuntimeError("core is gone")))
    with pytest.raises(EngineRefusedError, match=r"out of memory.*core is gone") as caught:
        put(service, make(weights, 1))
    assert caught.value.details["stands_still"]
    assert same(client.live(), weights)


def test_a_second_rollback_that_fails_says_so_too(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    patch = make(weights, 1)
    client.flushes = [False, False, False]
    for _ in range(2):
        with pytest.raises(EngineRefusedError, match="stands still") as caught:
            put(service, patch)
        assert caught.value.details["stands_still"]
    put(service, patch)
    assert not client.stopped


def test_a_mark_that_stays_on_disk_is_not_believed(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = service.store.set_unclean

    def only_true(unclean: bool) -> None:
        if not unclean:
            raise FULL
        plain(unclean)

    client.flushes = [False]
    with monkeypatch.context() as full:
        full.setattr(service.store, "set_unclean", only_true)
        with pytest.raises(EngineRefusedError, match="prefix cache"):
            put(service, make(weights, 1))
    assert service.store.unclean
    assert not client.stopped
    assert run(service.health()) == []
    client.stopped = True  # by the operator
    put(service, make(weights, 1))
    assert client.stopped
    assert not service.store.unclean


@pytest.mark.parametrize("call", ["reset_prefix_cache", "update_weight_version"])
def test_an_engine_core_that_hangs_does_not_hold_the_change(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(vllm_client, "RPC_DEADLINE", 0.1)
    with monkeypatch.context() as hanging:
        hanging.setattr(client, call, never)
        with pytest.raises(EngineRefusedError, match=f"did not answer {call}"):
            run(asyncio.wait_for(change(service, make(weights, 1)), 20))
    monkeypatch.setattr(vllm_client, "RPC_DEADLINE", 60.0)
    put(service, make(weights, 1))
    assert not client.stopped
    assert run(service.verify())["ok"]


def test_who_waits_in_the_same_process_is_told_in_time(service: PatchService) -> None:
    async def two() -> None:
        async with service.exclusive():
            with pytest.raises(StackConflictError, match=r"under way for 0 s"):
                async with service.exclusive(patience=0.05):
                    raise AssertionError("two at once")
        async with service.exclusive(patience=math.inf):
            pass

    run(asyncio.wait_for(two(), 20))


def test_confirmations_that_wait_leave_the_change_its_threads(
    service: PatchService, weights: list[torch.Tensor]
) -> None:
    put(service, make(weights, 1))

    async def many() -> None:
        async with service.exclusive():
            waiting = [asyncio.ensure_future(service.confirm(None, "me")) for _ in range(80)]
            await asyncio.sleep(0.1)
            await asyncio.wait_for(asyncio.to_thread(lambda: None), 10)
        assert await asyncio.gather(*waiting) == [[]] * 80

    run(asyncio.wait_for(many(), 60))


def test_a_restart_is_the_cure_for_foreign_weights(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    put(service, make(weights, 1, (0,)))
    reload(client, 0, weights[0] + 1, range(RANKS))
    assert not run(service.verify())["ok"]
    assert run(service.health()) == ["drift"]
    fresh = FakeClient(weights, RANKS)
    again = PatchService(fresh, Store(service.store.folder))
    run(again.restore(fresh=True))
    assert run(again.health()) == []
    assert again.store.ledger()[-1]["event"] == "drift-gone"
    assert same(fresh.live(), folded(weights, make(weights, 1, (0,))))


def test_of_a_sleeping_engine_no_weight_is_touched(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    a = make(weights, 1)
    put(service, a)
    client.engine_core.model_executor.sleeping_tags = {"weights", "kv_cache"}
    client.log.clear()
    for asked in (service.verify, service.heal, lambda: change(service)):
        with pytest.raises(EngineRefusedError, match="sleeps") as caught:
            run(asked())
        assert "Wake it" in caught.value.cure
    assert set(client.log) == {"probe"}
    client.engine_core.model_executor.sleeping_tags = {"kv_cache"}
    put(service)
    assert same(client.live(), weights)


def test_health_is_told_while_a_change_hangs(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("patcher.engine.service.HEALTH_DEADLINE", 0.05)
    service.store.set_drift(["layers.0"])

    async def during() -> list[str]:
        async with service.exclusive():
            assert await service.health() == ["drift"]
            client.hangs = {"patcher_probe"}
            return await service.health()

    assert run(during()) == ["drift", "no-answer"]


def test_two_that_ask_for_health_are_no_change(tmp_path: Path) -> None:
    one, other = Store(tmp_path), Store(tmp_path)
    handle = one._lock_file("change.lock")
    try:  # as the one looks
        assert folder_module._try_lock(handle, folder_module.fcntl.LOCK_SH)
        assert not other.changing()
    finally:
        os.close(handle)
    with one.exclusive():
        assert other.changing()


def test_a_state_folder_that_is_gone_is_named(
    service: PatchService, weights: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(folder_module.os, "open", gone)
    with pytest.raises(EngineRefusedError, match="Read-only file system"):
        run(service.verify())
    assert run(service.health()) == ["no-state"]


def test_engines_that_differ_are_changing_and_nobodys_stop(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM asks data-parallel engines and raises where their answers differ."""
    differ = fails(RuntimeError("Engines returned different results"))
    with monkeypatch.context() as apart:
        apart.setattr(client, "get_weight_version", differ)
        engine = run(service.status())["engine"]
    assert (engine["state"], engine["weight_version"]) == ("changing", None)
    monkeypatch.setattr(client, "is_paused", differ)
    put(service, make(weights, 1))
    assert not client.stopped


def counted(outcome: str) -> float:
    return float(metrics()._changes.labels(outcome)._value.get())


def test_a_stack_that_is_in_force_already_is_no_change(
    service: PatchService, weights: list[torch.Tensor]
) -> None:
    a = make(weights, 1)
    put(service, a)
    done, unchanged, pauses = counted("done"), counted("unchanged"), metrics()._pause._sum.get()
    put(service, a)
    assert (counted("done"), counted("unchanged")) == (done, unchanged + 1)
    assert metrics()._pause._sum.get() == pauses
    wish = {"if_match": service.store.in_force().version, "in_flight": "recompute", "actor": "me"}
    with pytest.raises(UsageError, match="adds no patch"):
        run(service.change([a.id], ttl=60.0, **wish))  # type: ignore[arg-type]


def test_containers_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each of them the server is process 1."""
    args = Namespace(api_server_count=1)
    here = plugin._instance(args)
    assert plugin._instance(args) == here
    monkeypatch.setattr(plugin.os, "readlink", lambda _: "pid:[1]")
    elsewhere = plugin._instance(args)
    Store(tmp_path).claim(here)
    Store(tmp_path).claim(here)  # a sibling
    with pytest.raises(EngineRefusedError, match="Another engine"):
        Store(tmp_path).claim(elsewhere)


@pytest.mark.parametrize(
    ("name", "value"), [("PATCHER_TRUST", "missing.toml"), ("PATCHER_SPACING", "often")]
)
def test_without_patches_it_starts_whatever_else_is_wrong(
    client: FakeClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
) -> None:
    monkeypatch.setenv("PATCHER_STATE", str(tmp_path))
    monkeypatch.setenv(name, value)

    def start() -> PluginState:
        state = State()
        args = Namespace(model="m", api_server_count=1)
        run(plugin.PatcherEndpoint().init_state(client, state, args))
        found: PluginState = state.patcher
        return found

    with pytest.raises(PatcherError):
        start()
    monkeypatch.setenv("PATCHER_DISABLE", "1")
    assert start().off == "PATCHER_DISABLE is set"
