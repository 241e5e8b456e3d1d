"""Which calls to the ranks come between the same two steps, over the played vLLM."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from patcher.engine import worker
from patcher.engine.ranks import AT_ONCE
from patcher.engine.service import PatchService
from patcher.errors import EngineRefusedError
from tests.engine.fake_vllm import RANKS, FakeClient
from tests.engine.test_faults import folded, make, put, same

LAYERS = (0, 1, 2)


class Crowd:
    """How many calls of ``method`` wait at once, each taking ``seconds`` by what ranks reply."""

    def __init__(self, client: FakeClient, method: str, seconds: float) -> None:
        self.most = self._now = 0
        plain, called = getattr(worker, method), client.collective_rpc

        def slow(*args: Any) -> dict[str, Any]:
            return {**plain(*args), "seconds": seconds}

        async def call(name: str, args: tuple[Any, ...] = ()) -> list[Any]:
            if name != method:
                return await called(name, args)
            self._now += 1
            self.most = max(self.most, self._now)
            await asyncio.sleep(0.005)
            self._now -= 1
            return await called(name, args)

        client.fail |= {(method, rank): slow for rank in range(RANKS)}
        client.collective_rpc = call  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("method", "seconds", "most"),
    [
        ("patcher_stage", 0.0001, 1),
        ("patcher_check", AT_ONCE, 1),
        ("patcher_check", AT_ONCE / 4, 2),
        ("patcher_check", 0.0001, 2),
    ],
)
def test_no_step_waits_for_more_than_one_module_or_a_moment(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    method: str,
    seconds: float,
    most: int,
) -> None:
    crowd = Crowd(client, method, seconds)
    patch = make(weights, 1, LAYERS)
    put(service, patch)
    assert same(client.live(), folded(weights, patch))
    assert crowd.most == most


def test_a_change_asks_the_ranks_no_more_than_it_needs(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    """Under load each of these but those in the pause waits for a step."""
    first, second = make(weights, 1, (0, 1)), make(weights, 2, (1,))
    put(service, first)
    staged = ["stage", "check_staged"]
    pause = ["pause keep", "commit", "flush"]
    assert client.log == [
        *("probe", "receive", "begin", *staged, *staged),
        *(*pause, "check", "check", "resume", "finish"),
    ]
    client.log.clear()
    put(service, first, second)  # the ranks hold the first, whose weights are looked at before
    assert client.log == [
        *("probe", "check", "check", "receive", "begin", *staged),
        *(*pause, "check", "resume", "finish"),
    ]


@pytest.mark.parametrize(("seconds", "in_the_pause"), [(0.0001, 3), (AT_ONCE, 1)])
def test_quick_reading_back_is_over_before_the_engine_goes_on(
    service: PatchService,
    client: FakeClient,
    weights: list[torch.Tensor],
    seconds: float,
    in_the_pause: int,
) -> None:
    Crowd(client, "patcher_check", seconds)
    put(service, make(weights, 1, LAYERS))
    gone_on = client.log.index("resume")
    assert client.log[:gone_on].count("check") == in_the_pause
    assert client.log.count("check") == len(LAYERS)


@pytest.mark.parametrize("at", LAYERS)
def test_a_weight_that_reads_back_differently_never_serves_where_reading_is_quick(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor], at: int
) -> None:
    def other(one: Any, nonce: str, name: str) -> dict[str, Any]:
        reply = worker.patcher_check(one, nonce, name)
        return {**reply, "digest": "0" * 64} if name == f"layers.{at}" else reply

    client.fail["patcher_check", 1] = other
    with pytest.raises(EngineRefusedError, match=f"layers.{at} reads back differently"):
        put(service, make(weights, 1, LAYERS))
    assert client.resumed
    assert all(same(live, weights) for live in client.resumed)
