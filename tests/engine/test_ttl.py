"""Time to live: a patch reverts by itself, once, unless it was confirmed.

Clocks are the test's own where time matters; the last test waits for a real engine.
"""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from patcher.client import Engine
from patcher.engine import lifetimes as lifetimes_module
from patcher.engine.lifetimes import Lifetimes, expire, watch
from patcher.engine.plugin import PatcherEndpoint
from patcher.engine.service import PatchService
from patcher.engine.stack import Stack
from patcher.engine.store import Store
from patcher.errors import StackConflictError, UnknownPatchError, UsageError
from patcher.patch import Patch
from tests.engine.conftest import answers
from tests.engine.fake_vllm import FakeClient
from tests.engine.server import Server
from tests.engine.test_faults import RANKS, boom, folded, make, run, same

HOUR = 3600.0
DAY = 24 * HOUR


class Clocks:
    """A wall clock that can be set, and one that only runs; seconds."""

    def __init__(self) -> None:
        self.wall_now = 1.8e9
        self.steady_now = 50.0

    def run(self, seconds: float) -> None:
        self.wall_now += seconds
        self.steady_now += seconds

    def lifetimes(self, store: Store) -> Lifetimes:
        return Lifetimes(store, lambda: self.wall_now, lambda: self.steady_now)


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def service(client: FakeClient, clocks: Clocks, tmp_path: Path) -> PatchService:
    service = PatchService(client, Store(tmp_path / "state"))
    service.lifetimes = clocks.lifetimes(service.store)
    return service


def put(service: PatchService, *patches: Patch, ttl: float | None = None) -> None:
    for patch in patches:
        service.store.add_patch(patch, "me")
    run(
        service.change(
            [p.id for p in patches],
            if_match=service.store.in_force().version,
            in_flight="recompute",
            actor="me",
            ttl=ttl,
        )
    )


def on_top_of(patch: Patch, *below: Patch) -> Patch:
    requires = {"requires": tuple(p.id for p in below)}
    return Patch.build(patch.manifest.model_copy(update=requires), dict(patch.deltas))


def in_force(service: PatchService) -> list[str]:
    return list(service.store.in_force().ids)


def expires(service: PatchService) -> dict[str, str | None]:
    return {p["id"]: p["expires"] for p in run(service.status())["patches"]}


def test_a_patch_reverts_when_its_time_is_over_and_not_before(
    service: PatchService, client: FakeClient, clocks: Clocks, weights: list[torch.Tensor]
) -> None:
    stays, goes = make(weights, 1), make(weights, 2)
    put(service, stays)
    put(service, stays, goes, ttl=2 * HOUR)
    assert expires(service) == {stays.id: None, goes.id: "2027-01-15T10:00:00.000Z"}
    clocks.run(2 * HOUR - 1)
    run(expire(service))
    assert in_force(service) == [stays.id, goes.id]
    clocks.run(1)
    run(expire(service))
    assert in_force(service) == [stays.id]
    assert same(client.live(), folded(weights, stays))
    done = service.store.ledger()[-1]
    assert done["event"] == "change-done"
    assert done["detail"]["actor"] == "ttl"
    assert done["detail"]["reason"] == f"time to live of {goes.id[:12]} ended"
    run(expire(service))
    assert service.store.ledger()[-1] == done


def test_a_confirmed_patch_stays(
    service: PatchService, clocks: Clocks, weights: list[torch.Tensor]
) -> None:
    a, b, c = make(weights, 1), make(weights, 2), make(weights, 3)
    put(service, a, b, ttl=HOUR)
    put(service, a, b, c)
    assert service.lifetimes.confirm([a.id], "me") == [a.id]
    entry = service.store.ledger()[-1]
    assert (entry["event"], entry["detail"]) == (
        "ttl-confirmed",
        {"actor": "me", "client": "", "patches": [a.id]},
    )
    assert service.lifetimes.confirm([a.id, c.id], "me") == [], "again is fine"
    assert service.store.ledger()[-1] == entry
    with pytest.raises(UnknownPatchError):
        service.lifetimes.confirm(["0" * 64], "me")
    clocks.run(DAY)
    run(expire(service))
    assert in_force(service) == [a.id, c.id]
    assert service.lifetimes.confirm(None, "me") == []


def test_all_are_confirmed_at_once(
    service: PatchService, clocks: Clocks, weights: list[torch.Tensor]
) -> None:
    a, b = make(weights, 1), make(weights, 2)
    put(service, a, b, ttl=HOUR)
    assert service.lifetimes.confirm(None, "me") == [a.id, b.id]
    clocks.run(DAY)
    run(expire(service))
    assert in_force(service) == [a.id, b.id]


def test_what_requires_a_patch_goes_with_it(
    service: PatchService, client: FakeClient, clocks: Clocks, weights: list[torch.Tensor]
) -> None:
    a, other = make(weights, 1), make(weights, 4)
    b = on_top_of(make(weights, 2), a)
    c = on_top_of(make(weights, 3), b)
    put(service, a, ttl=HOUR)
    put(service, a, other, b, c)
    told = expires(service)
    assert told[other.id] is None
    assert told[a.id] == told[b.id] == told[c.id] == "2027-01-15T09:00:00.000Z"
    for wanted in ([c.id], [b.id, c.id]):
        with pytest.raises(StackConflictError, match="requires another"):
            service.lifetimes.confirm(wanted, "me")
    clocks.run(HOUR)
    run(expire(service))
    assert in_force(service) == [other.id]
    assert same(client.live(), folded(weights, other))
    reason = service.store.ledger()[-1]["detail"]["reason"]
    assert reason == (f"time to live of {a.id[:12]} ended; {b.id[:12]}, {c.id[:12]} required it")


def test_a_change_meanwhile_leaves_the_deadline_as_it_was(
    service: PatchService, clocks: Clocks, weights: list[torch.Tensor]
) -> None:
    a, b, c = make(weights, 1), make(weights, 2), make(weights, 3)
    put(service, a, ttl=HOUR)
    clocks.run(HOUR / 2)
    put(service, a, b, ttl=DAY)
    put(service, b, a, c)  # in another order, with one more
    with pytest.raises(UsageError, match="adds no patch"):
        put(service, b, a, ttl=HOUR)
    clocks.run(HOUR / 2)
    run(expire(service))
    assert in_force(service) == [b.id, c.id]
    clocks.run(DAY)
    run(expire(service))
    assert in_force(service) == [c.id]


def test_one_that_was_reverted_by_hand_begins_anew(
    service: PatchService, clocks: Clocks, weights: list[torch.Tensor]
) -> None:
    a = make(weights, 1)
    put(service, a, ttl=HOUR)
    put(service)
    put(service, a)
    clocks.run(DAY)
    run(expire(service))
    assert in_force(service) == [a.id]


@pytest.mark.parametrize("jump", [-DAY, DAY])
def test_a_clock_that_jumps_while_the_server_runs_changes_nothing(
    service: PatchService, clocks: Clocks, weights: list[torch.Tensor], jump: float
) -> None:
    a = make(weights, 1)
    put(service, a, ttl=HOUR)
    run(expire(service))
    clocks.wall_now += jump
    clocks.run(HOUR - 1)
    run(expire(service))
    assert in_force(service) == [a.id]
    clocks.run(1)
    run(expire(service))
    assert in_force(service) == []


def test_a_clock_that_was_set_back_between_two_starts_gives_no_more_than_the_whole_time(
    service: PatchService, clocks: Clocks, weights: list[torch.Tensor]
) -> None:
    put(service, make(weights, 1), ttl=HOUR)
    clocks.wall_now -= DAY
    service.lifetimes = clocks.lifetimes(service.store)  # as another process has it
    run(expire(service))
    clocks.run(HOUR)
    run(expire(service))
    assert in_force(service) == []


def test_a_confirmation_that_comes_at_the_last_moment_counts(
    service: PatchService,
    clocks: Clocks,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a = make(weights, 1)
    put(service, a, ttl=HOUR)
    clocks.run(HOUR)
    plain = service.change

    async def confirm_first(*args: Any, **options: Any) -> Any:
        service.lifetimes.confirm([a.id], "me")
        return await plain(*args, **options)

    monkeypatch.setattr(service, "change", confirm_first)
    run(expire(service))
    assert in_force(service) == [a.id]
    assert service.store.ledger()[-1]["event"] == "ttl-confirmed"


def test_of_several_api_servers_one_reverts(
    service: PatchService, client: FakeClient, clocks: Clocks, weights: list[torch.Tensor]
) -> None:
    others = [PatchService(client, Store(service.store.folder)) for _ in range(3)]
    for other in others:
        other.lifetimes = clocks.lifetimes(other.store)
    put(service, make(weights, 1), ttl=HOUR)
    clocks.run(HOUR)

    async def all_at_once() -> None:
        await asyncio.gather(*(expire(one) for one in (service, *others)))

    run(all_at_once())
    assert in_force(service) == []
    by_ttl = [e for e in service.store.ledger() if e["detail"].get("actor") == "ttl"]
    assert [e["event"] for e in by_ttl] == ["change-intent", "change-done"]


def test_a_revert_that_fails_is_recorded_and_tried_again(
    service: PatchService,
    client: FakeClient,
    clocks: Clocks,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("LOOK_EVERY", "RETRY_AFTER"):
        monkeypatch.setattr(lifetimes_module, name, 0.01)
    put(service, make(weights, 1), ttl=HOUR)
    clocks.run(HOUR)
    client.fail[("patcher_commit", 1)] = boom

    async def until(true: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not true():
                await asyncio.sleep(0.01)

    async def scene() -> None:
        watching = asyncio.ensure_future(watch(service))
        await until(lambda: service.store.ledger()[-1]["event"] == "change-failed")
        assert in_force(service) != []
        client.fail.clear()
        await until(lambda: in_force(service) == [])
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    run(scene())
    assert same(client.live(), weights)


def start(client: FakeClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the API server does before it serves; the plugin's state, its loop ended."""
    monkeypatch.setenv("PATCHER_STATE", str(folder))
    state: Any = SimpleNamespace()

    async def serve() -> None:
        endpoint = PatcherEndpoint()
        await endpoint.init_state(client, state, Namespace(model="m"))  # type: ignore[arg-type]
        endpoint._watch.cancel()
        await asyncio.gather(endpoint._watch, return_exceptions=True)

    run(serve())
    return state.patcher


@pytest.mark.parametrize("lived", [HOUR / 2, 2 * HOUR])
def test_a_start_reverts_what_ran_out_before_it_serves(
    client: FakeClient,
    weights: list[torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lived: float,
) -> None:
    store = Store(tmp_path / "state")
    old = PatchService(client, store)
    old.lifetimes = Lifetimes(store, lambda: time.time() - lived)
    a, b = make(weights, 1), make(weights, 2)
    put(old, b)
    put(old, b, a, ttl=HOUR)
    fresh = FakeClient(weights, RANKS)
    plugin = start(fresh, store.folder, monkeypatch)
    left = [b] if lived > HOUR else [b, a]
    assert plugin.service.store.committed() == Stack(tuple(p.id for p in left))
    assert same(fresh.live(), folded(weights, *left))


def test_a_start_without_restore_reverts_nothing(
    client: FakeClient, weights: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "state")
    old = PatchService(client, store)
    old.lifetimes = Lifetimes(store, lambda: 0.0)  # long ago
    a = make(weights, 1)
    put(old, a, ttl=HOUR)
    monkeypatch.setenv("PATCHER_NO_RESTORE", "1")
    plugin = start(FakeClient(weights, RANKS), store.folder, monkeypatch)
    assert plugin.service.store.committed() == Stack((a.id,))
    assert run(plugin.service.status())["patches"] == []
    put(plugin.service, a)  # on again, and this time for good
    assert expires(plugin.service) == {a.id: None}


@pytest.mark.engine
@pytest.mark.model
def test_a_real_engine_takes_an_unconfirmed_patch_back(
    server: Server, engine: Engine, patch_a: Patch, patch_b: Patch, prompts: list[str]
) -> None:
    before = answers(server, prompts, 8)
    engine.apply(patch_b, ttl="1d")
    assert engine.confirm(patch_b.id[:8]) == [patch_b.id]
    engine.revert(all=True)
    engine.apply(patch_a, ttl=0.5)
    deadline = time.monotonic() + 120
    while engine.status()["stack"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert engine.status()["stack"] == []
    assert answers(server, prompts, 8) == before
    done = [e for e in engine.ledger() if e["event"] == "change-done"][-1]
    assert done["detail"]["actor"] == "ttl"
    with pytest.raises(UsageError, match="what to confirm"):
        engine._call("POST", "confirm", (), json={})
    with pytest.raises(UsageError, match="ttl"):
        engine._call("PUT", "stack", (), headers={"If-Match": "x"}, json={"stack": [], "ttl": -1})
