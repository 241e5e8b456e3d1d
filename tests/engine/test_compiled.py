"""vLLM's default, compiled mode: the graphs hold nothing of the old weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from patcher.client import Engine
from patcher.patch import Patch
from tests.engine.conftest import answers
from tests.engine.patches import merge, module_name
from tests.engine.server import Server, serving
from tests.engine.test_refusals import patcher

pytestmark = [pytest.mark.engine, pytest.mark.model]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One compile cache for the engines of this module: all run with the plugin."""
    return {"VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("compiled"))}


@pytest.fixture(scope="module")
def compiled(
    real_model: Path, tmp_path_factory: pytest.TempPathFactory, cache: dict[str, str]
) -> Iterator[Server]:
    server = Server(
        real_model,
        tmp_path_factory.mktemp("server"),
        "--worker-extension-cls",
        "tests.engine.tamper.Tamper",
        environment={**cache, "VLLM_SERVER_DEV_MODE": "1"},
    )
    with serving(server) as started:
        yield started


def test_patched_equals_merged_in_compiled_mode(
    compiled: Server,
    real_model: Path,
    tmp_path: Path,
    cache: dict[str, str],
    patch_a: Patch,
    prompts: list[str],
) -> None:
    base = answers(compiled, prompts)
    with Engine(compiled.url, compiled.token) as engine:
        assert not engine.status()["engine"]["eager"]
        engine.apply(patch_a)
        patched = answers(compiled, prompts)
        assert engine.verify()["ok"]
        engine.revert(patch_a.id)
    assert answers(compiled, prompts) == base
    assert patched != base
    checkpoint = merge(real_model, [patch_a], tmp_path / "model")
    with serving(Server(checkpoint, tmp_path / "merged", environment=cache)) as merged:
        assert answers(merged, prompts) == patched


def test_verify_finds_a_weight_that_was_changed_behind_its_back(
    compiled: Server, patch_a: Patch
) -> None:
    with Engine(compiled.url, compiled.token) as engine:
        engine.apply(patch_a)
        assert engine.verify()["ok"]
        httpx.post(
            f"{compiled.url}/collective_rpc",
            json={"method": "tamper", "args": [module_name(4)]},
            timeout=60,
        ).raise_for_status()
        verdict = engine.verify()
        code, document = patcher("verify", token=compiled.token, url=compiled.url)
    assert not verdict["ok"]
    assert verdict["modules"][module_name(4)] is False
    assert verdict["modules"][module_name(3)] is True
    assert code == 9
    assert document["ok"] is False
