"""What is committed survives kill -9; the kill switches; a start that must not serve."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from patcher.client import Engine
from patcher.engine.stack import Stack
from patcher.engine.store import Store
from patcher.errors import EngineRefusedError
from patcher.patch import Patch
from patcher.protocol import Verification
from tests.engine.conftest import EAGER
from tests.engine.patches import random_patch, weights
from tests.engine.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.model]
PROMPT = "The capital of France is"


@pytest.fixture
def mortal(real_model: Path, tmp_path: Path) -> Iterator[Server]:
    server = Server(real_model, tmp_path, EAGER)
    yield server
    server.kill(signal.SIGKILL)


def test_kill_nine_then_every_kind_of_start(mortal: Server, patch_a: Patch, patch_b: Patch) -> None:
    mortal.start()
    base = mortal.complete(PROMPT, 24)
    with Engine(mortal.url, mortal.token) as engine:
        engine.apply(patch_a)
        engine.apply(patch_b)
        patched, before, status = mortal.complete(PROMPT, 24), engine.verify(), engine.status()
    assert patched != base
    mortal.kill(signal.SIGKILL)

    mortal.start()
    with Engine(mortal.url, mortal.token) as engine:
        assert engine.status()["stack"] == [patch_a.id, patch_b.id]
        assert engine.status()["patches"] == status["patches"], "in force since then, not since now"
        after = engine.verify()
        assert after["ok"]
        assert _digests(after) == _digests(before)
    assert mortal.complete(PROMPT, 24) == patched
    mortal.stop()

    mortal.start("--no-restore")
    assert mortal.complete(PROMPT, 24) == base
    with Engine(mortal.url, mortal.token) as engine:
        assert engine.status()["stack"] == []
        assert engine.ledger()[-1]["event"] == "start-without-restore"
    mortal.kill(signal.SIGKILL)

    mortal.start(PATCHER_DISABLE="1")
    assert mortal.complete(PROMPT, 24) == base
    with Engine(mortal.url, mortal.token) as engine, pytest.raises(EngineRefusedError):
        engine.status()
    mortal.stop()
    store = Store(mortal.folder / "state")
    assert store.ledger()[-1]["event"] == "start-disabled"
    assert store.committed().ids == (patch_a.id, patch_b.id), "held, to be restored"


def test_a_stack_that_cannot_be_restored_keeps_the_server_from_serving(
    mortal: Server, real_model: Path
) -> None:
    other = {n: w + torch.ones_like(w) * 0.01 for n, w in weights(real_model).items()}
    foreign = random_patch(real_model, 9, base=other)
    store = Store(mortal.folder / "state")
    store.add_patch(foreign, "test")
    store.commit(Stack((foreign.id,)), "change-done", {})
    with pytest.raises(RuntimeError, match="did not start"):
        mortal.start()
    assert "not those that the patch was computed on" in mortal.log()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{mortal.url}/health", timeout=2)


def _digests(verification: Verification) -> dict[str, str]:
    return {n: m["digest"] for n, m in verification["ranks"][0]["modules"].items()}
