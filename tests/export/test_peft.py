"""``export --peft``: an adapter that does what the patches do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from patcher.errors import BaseMismatchError, NumericalError, StackConflictError, UsageError
from patcher.export import to_peft
from patcher.patch import Delta, Patch
from tests.engine import families
from tests.unlearn import tiny

from .making import down, fold_into, logits, network, patch_on, written


def with_adapter(base: Path, adapter: Path, dtype: str | torch.dtype = "auto") -> Any:
    return PeftModel.from_pretrained(network(base, dtype), adapter)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in float32, where an adapter's sum is rounded as little as the fold."""
    return tiny.save(tmp_path_factory.mktemp("wide"), dtype=torch.float32)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Up to float32's rounding, on logits of size 1 to 10."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_peft_gives_the_patched_logits(tmp_path: Path, wide: Path) -> None:
    patch = patch_on(network(wide), {down(1): "multiplicative", down(2): "additive"})
    found = to_peft([written(patch, tmp_path / "p.st")], tmp_path / "adapter", wide)
    wanted = logits(fold_into(network(wide), patch))
    close(logits(with_adapter(wide, tmp_path / "adapter")), wanted)
    assert (wanted - logits(network(wide))).abs().max() > 0.1
    assert found.as_dict() == {
        "kind": "peft",
        "path": str(tmp_path / "adapter"),
        "patches": [patch.id],
        "modules": {down(1): 3, down(2): 3},
        "rank": 3,
        "bytes": sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir()),
    }


def test_the_factors_are_the_patchs_own(tmp_path: Path, wide: Path) -> None:
    patch = patch_on(network(wide), {down(1): "multiplicative", down(2): "additive"})
    to_peft([patch], tmp_path / "adapter", wide)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model." + down(2)
    one, two = patch.deltas[down(1)].to_torch(), patch.deltas[down(2)].to_torch()
    assert torch.equal(held[f"{key}.lora_B.weight"], two.left)
    assert torch.equal(held[f"{key}.lora_A.weight"], two.right)
    key = "base_model.model." + down(1)
    weight = network(wide).get_submodule(down(1)).weight.double()
    assert torch.equal(held[f"{key}.lora_B.weight"], one.left)
    assert torch.equal(held[f"{key}.lora_A.weight"], (one.right.double() @ weight).float())


def test_layer_1_is_not_layer_11(tmp_path: Path) -> None:
    deep = {**tiny.FAMILIES["llama"], "num_hidden_layers": 12}
    base = tiny.save(tmp_path / "base", dtype=torch.float32, settings=deep)
    patch = patch_on(network(base), {down(1): "additive"})
    to_peft([patch], tmp_path / "adapter")
    loaded = with_adapter(base, tmp_path / "adapter")
    changed = {name.partition(".lora_")[0] for name in loaded.state_dict() if ".lora_" in name}
    assert changed == {f"base_model.model.{down(1)}"}
    close(logits(loaded), logits(fold_into(network(base), patch)))


def test_gpt2_whose_weights_are_transposed(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", "gpt2", dtype=torch.float32)
    name = "transformer.h.{}.mlp.c_proj"
    patch = patch_on(network(base), {name.format(1): "multiplicative", name.format(2): "additive"})
    to_peft([patch], tmp_path / "adapter", base)
    close(logits(with_adapter(base, tmp_path / "adapter")), logits(fold_into(network(base), patch)))


def test_a_stack_of_both_kinds_and_several_ranks_is_one_adapter(tmp_path: Path, wide: Path) -> None:
    model = network(wide)
    stack = [
        patch_on(model, {down(0): "multiplicative", down(1): "multiplicative"}, 1, rank=2),
        patch_on(model, {down(1): "additive", down(2): "additive"}, 2, rank=5),
        patch_on(model, {down(1): "multiplicative", down(0): "multiplicative"}, 3, rank=4),
        patch_on(model, {down(1): "multiplicative", down(2): "additive"}, 4, rank=1),
    ]
    found = to_peft(stack, tmp_path / "adapter", wide)
    assert found.modules == {down(0): 6, down(1): 12, down(2): 6}
    assert found.rank == 12
    close(
        logits(with_adapter(wide, tmp_path / "adapter")),
        logits(fold_into(network(wide), *stack)),
    )
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (12, 12)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {len(value) for key, value in held.items() if ".lora_A." in key} == {12}


def test_additive_patches_need_no_model(tmp_path: Path, wide: Path) -> None:
    patch = patch_on(network(wide), {down(1): "additive"})
    to_peft([patch], tmp_path / "adapter")
    close(logits(with_adapter(wide, tmp_path / "adapter")), logits(fold_into(network(wide), patch)))


def refused(tmp_path: Path, kind: type[Exception], text: str, *args: Any) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=text):
        to_peft(args[0], tmp_path / "adapter", *args[1:])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_multiplicative_patch_without_its_model_is_refused(tmp_path: Path, wide: Path) -> None:
    patch = patch_on(network(wide), {down(1): "multiplicative"})
    refused(tmp_path, UsageError, "--model", [patch])


def test_another_models_weights_are_refused(tmp_path: Path, wide: Path, llama: Path) -> None:
    additive = patch_on(network(wide), {down(1): "additive"})
    other = tiny.save(tmp_path / "other", dtype=torch.float32, seed=6)
    refused(tmp_path, BaseMismatchError, "not those", [additive], other)
    multiplicative = patch_on(network(wide), {down(1): "multiplicative"})
    refused(tmp_path, BaseMismatchError, "not those", [multiplicative], other)


def test_an_order_that_an_engine_refuses_is_refused(tmp_path: Path, wide: Path) -> None:
    lower = patch_on(network(wide), {down(1): "additive"})
    upper = patch_on(network(wide), {down(1): "additive"}, 1, requires=[lower.id])
    refused(tmp_path, StackConflictError, "requires", [upper, lower])


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    base = families.save(tmp_path / "base", "qwen3_moe")
    patch = families.patch_on(families.targets(network(base)))
    refused(tmp_path, UsageError, "experts", [patch], base)


def test_factors_beyond_float32_are_refused(tmp_path: Path, wide: Path) -> None:
    """Of two gentle patches, whose factors are lopsided: they meet in the composition."""
    stack = []
    for seed, factor in ((1, 1e30), (2, 1e-37)):
        patch = patch_on(network(wide), {down(1): "multiplicative"}, seed, scale=1.0)
        left, right = patch.deltas[down(1)].left, patch.deltas[down(1)].right
        lopsided = Delta.multiplicative(left * factor, right / factor)
        stack.append(Patch.build(patch.manifest, {down(1): lopsided}))
    refused(tmp_path, NumericalError, "not finite", stack, wide)


def test_a_folder_with_something_in_it_stays_as_it_is(tmp_path: Path, wide: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine").write_text("keep")
    refused(tmp_path, UsageError, "there already", [patch_on(network(wide), {down(1): "additive"})])


@pytest.mark.model
def test_the_real_model(tmp_path: Path, real_model: Path) -> None:
    kinds = {down(9): "multiplicative", down(10): "additive"}
    patch = patch_on(
        network(real_model, torch.float32), kinds, rank=8, scale=0.01, dtype=torch.bfloat16
    )
    to_peft([patch], tmp_path / "adapter", real_model)
    # Both in float32: the adapter is the edit before it is rounded, the fold after it.
    adapted = logits(with_adapter(real_model, tmp_path / "adapter", torch.float32))
    patched = logits(fold_into(network(real_model), patch).float())
    base = logits(network(real_model, torch.float32))
    moved, off = (patched - base).abs().max(), (adapted - patched).abs().max()
    assert moved > 1
    assert off < 0.02 * moved
    exact = logits(fold_into(network(real_model, torch.float32), patch))
    torch.testing.assert_close(adapted, exact, rtol=0, atol=2e-3)
