"""Models with more than one network in them: a draft model, a multimodal wrapper."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from tests.engine import families
from tests.engine.offline_files import Files
from tests.engine.scripts import run_script
from tests.engine.wrapped_script import MULTIMODAL, NAMES
from tests.unlearn.tiny import VOCABULARY, tokenizer

pytestmark = pytest.mark.engine


def save_multimodal(folder: Path) -> Path:
    """A tiny random PaliGemma: the multimodal family that needs no torchvision here."""
    torch.manual_seed(1)
    text = {**families.FAMILIES["gemma"], "model_type": "gemma", "vocab_size": VOCABULARY}
    text |= {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    width = text["hidden_size"]
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=3,
        projection_dim=width,
        hidden_size=width,
    )
    model: Any = PaliGemmaForConditionalGeneration(config).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def patch_multimodal(folder: Path) -> None:
    """The patch under each name, and a checkpoint with it merged in."""
    model = save_multimodal(folder / "multimodal")
    held = load_file(model / "model.safetensors")
    down = {
        name.removesuffix(".weight"): weight
        for name, weight in held.items()
        if re.search(r"language_model.*mlp\.down_proj\.weight$", name)
    }
    assert len(down) == 2
    (folder / "names").mkdir()
    for spelled, prefix in NAMES.items():
        named = {re.sub(r"^.*\.layers", prefix, name): weight for name, weight in down.items()}
        families.patch_on(named).write(folder / "names" / f"{spelled}.st")
    families.fold_into(down, families.patch_on(down))
    merged = shutil.copytree(model, folder / "multimodal-merged")
    save_file(held, merged / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("wrapped")
    Files(folder)
    (folder / "model").rename(folder / "target")
    families.save(folder / "draft", num_hidden_layers=1)
    patch_multimodal(folder)
    return run_script("wrapped_script", folder, VLLM_ENABLE_V1_MULTIPROCESSING="0")


def test_a_draft_model_is_left_alone_and_says_nothing(found: dict[str, Any]) -> None:
    of = found["draft"]
    assert of["base"] != of["merged"]
    assert of["patched"] == of["merged"]
    assert of["reverted"] == of["base"]
    assert of["verified"]["ok"]
    assert of["draft after"] == of["draft before"]


@pytest.mark.parametrize("spelled", sorted(NAMES))
def test_names_of_a_wrapped_language_model_are_mapped(found: dict[str, Any], spelled: str) -> None:
    of = found["multimodal"]
    assert of["base"] != of["merged"]
    assert of["patched"][spelled] == [of["merged"], True]
    assert of["reverted"] == of["base"]


def test_two_names_of_one_layer_are_refused(found: dict[str, Any]) -> None:
    code, message, _ = found["multimodal"]["two names"]
    assert code == "engine-refused"
    assert "one and the same layer" in message
    assert found["multimodal"]["after"] == [[], found["multimodal"]["base again"]]


@pytest.mark.parametrize("family", sorted(MULTIMODAL.values()))
def test_vllms_own_mappers_lead_to_the_language_model(found: dict[str, Any], family: str) -> None:
    assert found["names"][family] == list(NAMES)
