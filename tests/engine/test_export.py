"""vLLM loads what ``patcher export`` wrote, and says what the patched engine says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from patcher.export import to_checkpoint, to_peft
from tests.engine import families
from tests.engine.scripts import run_script
from tests.export.making import down, network, patch_on, written

pytestmark = pytest.mark.engine

CLOSE = 3e-5  # log-probabilities in float32: the adapter adds on the side, the patch is folded


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("export")
    model = families.save(folder / "model", dtype=torch.float32)
    base = network(model)
    # Of several ranks and kinds, on one module both.
    patches = [
        written(patch_on(base, kinds, seed, rank), folder / f"{seed}.st")
        for seed, (rank, kinds) in enumerate(
            [
                (3, {down(0): "multiplicative", down(1): "multiplicative"}),
                (4, {down(1): "additive"}),
            ]
        )
    ]
    to_peft(patches, folder / "adapter", model)
    to_checkpoint(patches, folder / "merged", model)
    return run_script(
        "export_script",
        model,
        folder / "adapter",
        folder / "merged",
        *patches,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )


def test_the_adapter_says_what_the_patches_say(found: dict[str, Any]) -> None:
    assert tokens(found["adapter"]) == tokens(found["patched"])
    assert apart(found["adapter"], found["patched"]) < CLOSE
    assert tokens(found["base"]) != tokens(found["patched"])


def test_the_checkpoint_says_it_to_the_bit(found: dict[str, Any]) -> None:
    assert found["merged"] == found["patched"]


def tokens(said: list[Any]) -> list[Any]:
    return [ids for ids, _ in said]


def apart(one: list[Any], other: list[Any]) -> float:
    pairs = zip(one, other, strict=True)
    return max(
        abs(a - b) for (_, ours), (_, theirs) in pairs for a, b in zip(ours, theirs, strict=True)
    )
