"""Many changes at once, changes that come fast, and ``continue``, over the played vLLM."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from patcher.engine import spacing, vllm_client
from patcher.engine.service import PatchService
from patcher.engine.spacing import TOKENS
from patcher.engine.stack import Stack
from patcher.engine.store import Store
from patcher.errors import EngineRefusedError
from tests.engine.fake_vllm import FakeClient
from tests.engine.test_faults import folded, make, put, run, same


def serve(client: FakeClient, folder: Path, longest: float = 10.0) -> PatchService:
    return PatchService(client, Store(folder / "state"), longest)


def stream(client: FakeClient, name: str = "a", tokens: int = 450) -> SimpleNamespace:
    """A request that runs."""
    one = SimpleNamespace(request_id=name, num_tokens=tokens, num_computed_tokens=tokens)
    client.engine_core.play(one)
    return one


def test_many_patches_are_one_transaction_and_one_flush(
    client: FakeClient, weights: list[torch.Tensor], tmp_path: Path
) -> None:
    service = serve(client, tmp_path)
    patches = [make(weights, seed) for seed in range(5)]
    put(service, *patches)
    assert same(client.live(), folded(weights, *patches))
    for once in ("pause keep", "commit", "flush", "resume"):
        assert client.log.count(once) == 1, once
    events = [e["event"] for e in service.store.ledger() if e["event"].startswith("change-")]
    assert events == ["change-intent", "change-done"]


def test_a_change_waits_until_what_was_recomputed_has_gone_on(
    client: FakeClient, weights: list[torch.Tensor], tmp_path: Path
) -> None:
    service, patch = serve(client, tmp_path), make(weights, 1)
    running = stream(client)
    put(service, patch)
    at_pause: list[int] = []
    plain = client.pause_generation

    async def pause(**how: Any) -> None:
        at_pause.append(running.num_tokens)
        await plain(**how)

    client.pause_generation = pause  # type: ignore[method-assign]

    async def decode() -> None:
        for _ in range(TOKENS):
            await asyncio.sleep(0.02)
            running.num_tokens += 1

    async def both() -> Any:
        going_on = asyncio.create_task(decode())
        back = service.change(
            [], if_match=Stack((patch.id,)).version, in_flight="recompute", actor="me"
        )
        outcome = await back
        await going_on
        return outcome

    outcome = run(both())
    assert at_pause == [450 + TOKENS]
    assert outcome.as_dict()["spaced_ms"] > 0


def test_a_stream_that_does_not_go_on_holds_changes_up_no_longer_than_was_set(
    client: FakeClient,
    weights: list[torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service, patch = serve(client, tmp_path, longest=5.0), make(weights, 1)
    stream(client)
    put(service, patch)
    clock = itertools.count()  # a second each time that it is asked
    monkeypatch.setattr(spacing, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(spacing, "_ASK_EVERY", 0.0)
    assert put(service).as_dict()["spaced_ms"] == 5000
    assert same(client.live(), weights)


@pytest.mark.parametrize("why", ["ended", "off", "drain", "nothing ran"])
def test_a_change_does_not_wait(
    client: FakeClient, weights: list[torch.Tensor], tmp_path: Path, why: str
) -> None:
    service = serve(client, tmp_path, longest=0.0 if why == "off" else 10.0)
    patch = make(weights, 1)
    if why != "nothing ran":
        stream(client)
    put(service, patch)
    if why == "ended":
        client.engine_core.play()
    outcome = put(service, in_flight="drain" if why == "drain" else "recompute")
    assert outcome.as_dict()["spaced_ms"] < 50
    assert "flush" in client.log


def test_continue_that_cannot_be_had_changes_nothing(
    client: FakeClient, weights: list[torch.Tensor], tmp_path: Path
) -> None:
    service, patch = serve(client, tmp_path), make(weights, 1)
    client.engine_core.scheduler.connector = object()
    with pytest.raises(EngineRefusedError, match="KV connector"):
        put(service, patch, in_flight="continue")
    assert same(client.live(), weights)
    assert not client.stopped
    assert "commit" not in client.log
    assert "flush" not in client.log, "running requests were not touched"
    assert service.store.ledger()[-1]["event"] == "change-failed"
    put(service, patch)
    assert same(client.live(), folded(weights, patch))


def test_continue_is_refused_where_its_requests_cannot_be_noted(
    client: FakeClient, weights: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, patch = serve(client, tmp_path), make(weights, 1)

    async def kept(client: object) -> list[str]:
        return ["a"]

    monkeypatch.setattr(vllm_client, "keep_requests", kept)
    (service.store.folder / "mixed.new").mkdir()  # what the note is first written to
    with pytest.raises(EngineRefusedError, match="can't be noted"):
        put(service, patch, in_flight="continue")
    assert same(client.live(), weights)
    (service.store.folder / "mixed.new").rmdir()
    outcome = put(service, patch, in_flight="continue")
    assert outcome.as_dict()["mixed"] == 1
    assert "flush" not in client.log
