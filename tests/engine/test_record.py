"""What the ledger keeps of who asked for what: over the routes, with vLLM played."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from patcher.engine.auth import OWNER, Role
from patcher.engine.routes import PluginState, router
from patcher.engine.service import PatchService
from patcher.protocol import ROUTE
from tests.engine.fake_vllm import RANKS, FakeClient
from tests.engine.test_faults import boom, make
from tests.engine.test_healing import reload

TOKEN = "an-admin-token-of-these-tests"
CHANGE = {"change", "actor", "client", "reason", "before", "after"}


class Asking:
    """Requests to the routes of a service, as any program makes them."""

    def __init__(self, service: PatchService) -> None:
        service.store.set_token(OWNER, Role.admin.name, TOKEN)
        self.service = service
        app = FastAPI()
        app.include_router(router())
        app.state.patcher = PluginState(service.store, service)
        self._transport = httpx.ASGITransport(app)

    def __call__(
        self, method: str, path: str, agent: bytes | None = b"curl/8.5", **options: Any
    ) -> Any:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=self._transport, base_url="http://engine"
            ) as client:
                del client.headers["User-Agent"]
                headers = {b"Authorization": f"Bearer {TOKEN}".encode()}
                headers |= {} if agent is None else {b"User-Agent": agent}
                version = self.service.store.in_force().version.encode()
                headers[b"If-Match"] = version
                return await client.request(method, f"{ROUTE}/{path}", headers=headers, **options)

        return asyncio.run(ask()).json()

    def last(self, event: str) -> dict[str, Any]:
        """The detail of the last entry of that event."""
        entries = self("GET", "ledger")["entries"]
        detail: dict[str, Any] = [e for e in entries if e["event"] == event][-1]["detail"]
        return detail


@pytest.fixture
def asking(service: PatchService) -> Asking:
    return Asking(service)


def test_a_change_is_recorded_with_who_what_with_and_what_it_led_to(
    asking: Asking, weights: list[torch.Tensor]
) -> None:
    patch = make(weights, 1, (0,))
    asking("POST", "patches", agent=b"uploader/1", content=patch.data)
    assert asking.last("patch-stored") == {
        "patch": patch.id,
        "actor": OWNER,
        "client": "uploader/1",
    }
    wish = {"stack": [patch.id], "reason": "request 17", "ttl": 3600}
    told = asking("PUT", "stack", json=wish)
    by = {"actor": OWNER, "client": "curl/8.5", "reason": "request 17", "change": told["change"]}
    stacks = {"before": [], "after": [patch.id]}
    intent = asking.last("change-intent")
    assert intent == {**by, **stacks, "in_flight": "recompute", "ttl": 3600.0}
    done = asking.last("change-done")
    assert done == {**by, **stacks, "outcome": "done", "ttl": 3600.0, "digests": done["digests"]}
    assert [len(ranks) for ranks in done["digests"].values()] == [RANKS]
    asking("POST", "confirm", agent=b"phone", json={"patches": None})
    assert asking.last("ttl-confirmed")["client"] == "phone"


def test_a_change_that_failed_or_was_interrupted_is_recorded_as_fully(
    asking: Asking, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    patch = make(weights, 1, (0,))
    asking("POST", "patches", content=patch.data)
    client.fail["patcher_commit", 1] = boom
    asking("PUT", "stack", json={"stack": [patch.id], "reason": "request 17"})
    failed = asking.last("change-failed")
    assert failed.keys() >= CHANGE
    assert (failed["outcome"], failed["cause"]) == ("failed", "engine-refused")
    intent = asking.last("change-intent")
    asking.service.store.record("change-intent", {**intent, "change": "killed"})
    client.fail.clear()
    asyncio.run(asking.service.restore())
    interrupted = asking.last("change-interrupted")
    assert interrupted == {**intent, "change": "killed", "outcome": "interrupted"}


def test_a_healing_is_recorded_with_who_asked_or_the_change_that_met_it(
    asking: Asking, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    a, b = make(weights, 1, (0,)), make(weights, 2, (1,))
    for patch in (a, b):
        asking("POST", "patches", content=patch.data)
    asking("PUT", "stack", json={"stack": [a.id]})
    reload(client, 0, weights[0], range(RANKS))
    asking("POST", "heal", agent=b"cron")
    healed = asking.last("drift-healed")
    assert (healed["actor"], healed["client"]) == (OWNER, "cron")
    reload(client, 0, weights[0], range(RANKS))
    change = asking("PUT", "stack", json={"stack": [a.id, b.id]})["change"]
    assert asking.last("drift-healed")["change"] == change


@pytest.mark.parametrize(
    ("agent", "kept"),
    [
        (None, ""),
        (b"x" * 500, "x" * 200),
        (b"red \x1b[31m \x9b text", "red ?[31m ? text"),
        ("ümlaut".encode("latin-1"), "ümlaut"),
    ],
    ids=["none", "long", "terminal", "latin"],
)
def test_what_a_client_calls_itself_is_bounded_and_steers_no_terminal(
    asking: Asking, weights: list[torch.Tensor], agent: bytes | None, kept: str
) -> None:
    asking("POST", "patches", agent=agent, content=make(weights, 1, (0,)).data)
    assert asking.last("patch-stored")["client"] == kept
