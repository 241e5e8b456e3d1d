"""What an operator sees of a running engine: metrics, health and logs; and its healing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from patcher.client import Engine
from patcher.errors import VerificationError
from patcher.patch import Patch
from tests.engine.conftest import EAGER, answers, emptied
from tests.engine.patches import module_name, random_patch
from tests.engine.server import Server, serving
from tests.engine.test_refusals import patcher
from tests.engine.tiny import tiny_llama

pytestmark = pytest.mark.engine

PROMPTS = ["The capital of France is", "In the year 1914"]
LAYERS = (0, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def patch(model: Path) -> Patch:
    return random_patch(model, 1, layers=LAYERS, scale=20.0)


@pytest.fixture(scope="module")
def watched(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(
        model,
        tmp_path_factory.mktemp("server"),
        EAGER,
        "--worker-extension-cls",
        "tests.engine.tamper.Tamper",
        environment={"VLLM_SERVER_DEV_MODE": "1"},
    )
    with serving(server):
        yield server


@pytest.fixture
def engine(watched: Server) -> Iterator[Engine]:
    with emptied(watched) as client:
        yield client


def metrics(server: Server) -> dict[str, float]:
    """The samples of ours in vLLM's own ``/metrics``."""
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("patcher_")]
    return {name: float(value) for name, value in pairs}


def health(server: Server) -> tuple[int, list[str]]:
    answer = httpx.get(f"{server.url}/plugins/patcher/v1/health", timeout=30)
    return answer.status_code, answer.json()["wrong"]


def on_workers(server: Server, method: str, *args: str) -> None:
    """Call a worker's method behind patcher's back, over vLLM's development route."""
    httpx.post(
        f"{server.url}/collective_rpc", json={"method": method, "args": list(args)}, timeout=60
    ).raise_for_status()


def test_metrics_tell_the_stack_and_what_became_of_changes(
    watched: Server, engine: Engine, patch: Patch, model: Path
) -> None:
    before = metrics(watched)
    named = f'patcher_patch_in_force{{patch="{patch.id[:12]}"}}'
    assert before["patcher_stack_depth"] == 0
    engine.apply(patch)
    after = metrics(watched)
    assert after["patcher_stack_depth"] == after[named] == 1
    done = 'patcher_changes_total{outcome="done"}'
    assert after[done] == before[done] + 1
    for name in ("patcher_pause_seconds", "patcher_change_seconds"):
        assert after[f"{name}_count"] == before[f"{name}_count"] + 1
        assert after[f"{name}_sum"] > before[f"{name}_sum"]
    stale = engine.status()["weight_version"]
    engine.revert(all=True)
    with pytest.raises(Exception, match="weight version"):
        engine.set_stack([patch.id], expect=stale)
    last = metrics(watched)
    assert named not in last
    assert last["patcher_stack_depth"] == 0
    assert last['patcher_changes_total{outcome="stack-changed"}'] >= 1


def test_a_reload_is_seen_and_the_next_change_heals_it(
    watched: Server, engine: Engine, patch: Patch, model: Path
) -> None:
    base = answers(watched, PROMPTS)
    engine.apply(patch)
    patched = answers(watched, PROMPTS)
    assert health(watched) == (200, [])
    on_workers(watched, "reload_weights")
    assert not engine.verify()["ok"]
    assert health(watched) == (503, ["drift"])
    assert metrics(watched)["patcher_drifted_modules"] == len(LAYERS)
    code, document = patcher("verify", "--heal", token=watched.token, url=watched.url)
    assert code == 0, document
    assert health(watched) == (200, [])
    assert metrics(watched)["patcher_drifted_modules"] == 0
    assert answers(watched, PROMPTS) == patched

    on_workers(watched, "reload_weights")  # and now without anybody asking
    above = random_patch(model, 2, layers=(1,), scale=20.0)
    engine.apply(above)
    engine.revert(above.id)
    assert engine.verify()["ok"]
    assert answers(watched, PROMPTS) == patched
    events = [entry["event"] for entry in engine.ledger()]
    assert events.count("drift-healed") == 2
    engine.revert(all=True)
    assert answers(watched, PROMPTS) == base


def test_log_lines_of_a_change_carry_its_id(watched: Server, engine: Engine, patch: Patch) -> None:
    change = engine.apply(patch, reason="request 17")
    assert [e for e in engine.ledger() if e["detail"].get("change") == change["change"]]
    lines = [line for line in watched.log().splitlines() if f"change={change['change']}" in line]
    assert any("actor=admin in_flight=recompute stack=0->1" in line for line in lines)
    assert any("outcome=done" in line and "pause_ms=" in line for line in lines)


def test_other_weights_are_refused_and_not_overwritten(watched: Server, patch: Patch) -> None:
    """The last one here: such an engine has to be restarted."""
    with Engine(watched.url, watched.token) as engine:
        engine.apply(patch)
        on_workers(watched, "tamper", module_name(LAYERS[0]))
        assert patcher("verify", "--heal", token=watched.token, url=watched.url)[0] == 9
        assert health(watched) == (503, ["drift"])
        with pytest.raises(VerificationError, match="Something else changed") as caught:
            engine.revert(all=True)
    assert caught.value.details["modules"] == [module_name(LAYERS[0])]
