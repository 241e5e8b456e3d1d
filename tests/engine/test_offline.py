"""``patcher.attach``: a ``vllm.LLM`` in a script, its core in the same process and in others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import patcher
from patcher.errors import EngineRefusedError
from patcher.kernels import digest
from tests.engine import families
from tests.engine.llms import LONG, TOKENS
from tests.engine.offline_files import Files
from tests.engine.scripts import run_script

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("offline"))


@pytest.fixture(scope="module")
def found(files: Files) -> dict[str, Any]:
    """The core in the script's own process, and VLLM_PLUGINS not set."""
    return run_script("offline_script", *files.all, VLLM_ENABLE_V1_MULTIPROCESSING="0")


def test_patched_equals_merged_and_reverted_equals_base(found: dict[str, Any]) -> None:
    assert found["base"] != found["merged"]
    assert found["patched"] == found["merged"]
    assert found["patched again"] == found["merged"]
    assert found["reverted"] == found["base"]


def test_the_verbs_are_those_of_the_engine(found: dict[str, Any], files: Files) -> None:
    assert found["change"]["stack"] == [files.patch.id]
    assert found["change"]["weight_version"] == found["version"]
    assert found["status"]["engine"]["state"] == "ready"
    assert found["status"]["stack"] == [files.patch.id]
    assert found["verified"]["ok"]
    assert set(found["verified"]["modules"]) == set(files.patch.deltas)
    assert found["again"][0] == "already-applied"


def test_a_refused_patch_changes_nothing(found: dict[str, Any]) -> None:
    assert found["refused"][0] == "base-mismatch"
    assert found["after refusal"] == [[], found["base again"]]
    assert found["ledger"][-1] == "change-failed"


def test_what_needs_a_server_is_refused(found: dict[str, Any]) -> None:
    assert found["guarded"][0] == "engine-refused"
    assert found["for an hour"][0] == "engine-refused"


def test_requests_that_the_script_steps_are_recomputed(found: dict[str, Any]) -> None:
    for (tokens, _), reason in found["recomputed"]:
        assert (len(tokens), reason) == (TOKENS, "length")
    assert [answer[0][0][:4] for answer in found["recomputed"]] == [
        answer[0][:4] for answer in found["base"][:2]
    ]
    assert [answer[0][0][4:] for answer in found["recomputed"]] == found["continued"]


def test_drain_waits_for_nobody_but_refuses(found: dict[str, Any]) -> None:
    error, stack = found["drain"]
    assert error[0] == "engine-refused"
    assert "Finish them first" in error[2]
    assert stack == []


def test_abort_leaves_no_request_behind(found: dict[str, Any]) -> None:
    assert [len(answer[0][0]) for answer in found["aborted"]] == [4, 4]


def test_the_end_of_the_with_block_gives_the_base_back(found: dict[str, Any]) -> None:
    assert found["after with"] == found["base"]


def test_a_state_folder_is_restored_and_belongs_to_one(found: dict[str, Any], files: Files) -> None:
    assert found["shared folder"][0] == "engine-refused"
    assert "Another engine uses" in found["shared folder"][1]
    assert found["restored"] == [[files.patch.id], found["merged"]]
    assert found["closed"] == found["base"]


def test_attached_twice_is_one_object(found: dict[str, Any]) -> None:
    assert found["same object"]
    assert found["second state"][0] == "usage"
    assert "close()" in found["second state"][2]


def test_what_is_no_llm_is_refused(found: dict[str, Any]) -> None:
    assert found["no llm"][0] == "usage"


def test_it_works_where_a_loop_runs_and_keeps_no_llm_alive(
    found: dict[str, Any], files: Files
) -> None:
    assert found["with a loop"] == [files.patch.id]
    assert found["freed"]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A model of a dense layer and one of experts, a patch of both, and what it makes of them."""
    folder = tmp_path_factory.mktemp("mixture")
    model = families.save(folder / "model", "qwen3_moe", mlp_only_layers=[0])
    maker: Any = AutoModelForCausalLM
    held = families.targets(maker.from_pretrained(model))
    patch = families.patch_on(held)
    patch.write(folder / "patch.st")
    families.fold_into(held, patch)
    return model, folder / "patch.st", {name: weight.flatten(1) for name, weight in held.items()}


@pytest.fixture(scope="module")
def parallel(mixture: tuple[Path, Path, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """vLLM's default: the core in a process of its own, here over two ranks."""
    model, patch, _ = mixture
    return run_script("offline_parallel_script", model, patch, VLLM_PLUGINS="patcher")


def test_two_ranks_in_other_processes(
    parallel: dict[str, Any], mixture: tuple[Path, Path, dict[str, torch.Tensor]]
) -> None:
    assert parallel["patched"] != parallel["base"]
    assert parallel["patched after"] == parallel["patched"]
    assert parallel["reverted"] == parallel["base"]
    assert parallel["after with"] == parallel["base"]
    assert parallel["verified"]["ok"]
    for rank, verdict in enumerate(parallel["verified"]["ranks"]):
        assert verdict["modules"].keys() == mixture[2].keys()
        for name, module in verdict["modules"].items():
            shard = mixture[2][name].chunk(2, dim=1)[rank]
            assert module["digest"] == digest(shard), (rank, name)


def test_requests_that_the_core_steps_by_itself_go_through_a_change(
    parallel: dict[str, Any],
) -> None:
    assert [(why, len(ids)) for why, ids in parallel["recomputed"]] == [("length", LONG)] * 3
    reasons = [why for why, _ in parallel["aborted"]]
    assert reasons[-3:] == ["abort"] * 3
    assert reasons == sorted(reasons, reverse=True)  # "length": what was over by then
    assert [len(ids) for _, ids in parallel["drained"]] == [TOKENS] * 3
    assert [ids[:4] for _, ids in parallel["drained"]] == [i[:4] for i, _ in parallel["base"]]


class PlayedLLM:
    """A ``vllm.LLM`` whose core is in another process, as far as it is looked at here."""

    def __init__(self, data_parallel_size: int = 1) -> None:
        self.llm_engine = self
        self.engine_core = self
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(model="m"),
            parallel_config=SimpleNamespace(data_parallel_size=data_parallel_size),
        )

    def call_utility(self, method: str, *args: Any) -> Any:
        raise AssertionError("nothing more is asked of an engine that can't answer")

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        # As vLLM 0.32 said it when it was tried on two ranks.
        raise Exception(
            "Call to collective_rpc method failed: Worker failed with error "
            f"''CPUWorker' object has no attribute '{method}'', please check the stack trace"
        )


def test_workers_without_the_plugin_are_named_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    with pytest.raises(EngineRefusedError, match=r'(?s)plugin.*"VLLM_PLUGINS".*before LLM'):
        patcher.attach(PlayedLLM())
    monkeypatch.setenv("VLLM_PLUGINS", "patcher")  # when the workers run already
    with pytest.raises(EngineRefusedError, match=r"plugin.*VLLM_PLUGINS.*before it starts"):
        patcher.attach(PlayedLLM())


def test_what_cannot_be_patched_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineRefusedError, match="data-parallel"):
        patcher.attach(PlayedLLM(data_parallel_size=2))
    monkeypatch.setenv("PATCHER_DISABLE", "1")
    with pytest.raises(EngineRefusedError, match="PATCHER_DISABLE"):
        patcher.attach(PlayedLLM())
