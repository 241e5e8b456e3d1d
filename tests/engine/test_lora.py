"""LoRA adapters beside patches: ``y = W' x + s B A x``, the patch on the base alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engine.offline_files import Files
from tests.engine.patches import weights
from tests.engine.scripts import run_script

pytestmark = pytest.mark.engine

RANK = 8
TARGETS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def random_adapter(model: Path, folder: Path) -> Path:
    """An adapter in PEFT's layout, on attention and MLP of every layer."""
    torch.manual_seed(3)
    tensors = {}
    for name, weight in weights(model).items():
        module = name.removesuffix(".weight")
        if module.endswith(TARGETS):
            d_out, d_in = weight.shape
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, d_in) / d_in**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(d_out, RANK) / RANK**0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [target.rpartition(".")[2] for target in TARGETS],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lora")
    files = Files(folder)
    adapter = random_adapter(files.model, folder / "adapter")
    return run_script(
        "lora_script",
        files.model,
        files.merged,
        files.patch_file,
        adapter,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )


def test_patch_and_adapter_equal_merged_checkpoint_and_adapter(found: dict[str, Any]) -> None:
    assert found["patched with adapter"] == found["merged with adapter"]
    assert found["patched with later adapter"] == found["merged with adapter"]
    assert found["patched"] == found["merged"]
    assert found["verified"]["ok"]
    said = ("base", "base with adapter", "merged", "merged with adapter")
    assert len({json.dumps(found[one]) for one in said}) == 4, "each must be seen in the answers"


def test_reverting_leaves_the_adapter_on_the_base(found: dict[str, Any]) -> None:
    assert found["reverted"] == found["base"]
    assert found["reverted with adapter"] == found["base with adapter"]
