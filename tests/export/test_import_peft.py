"""``import --peft``: a LoRA adapter becomes an additive patch, or is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from patcher.errors import ModelError, PatcherError, UsageError
from patcher.export import from_peft, to_peft
from patcher.patch import Patch, commitment, owner_salt
from tests.unlearn import tiny

from .making import down, fold_into, logits, network, patch_on


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("wide"), dtype=torch.float32)


def adapter(base: Path, folder: Path, seed: int = 0, **settings: Any) -> Any:
    """An adapter that PEFT made and saved, and the model with it; its values are random."""
    config: Any = LoraConfig
    made = get_peft_model(
        network(base),
        config(**{"r": 4, "lora_alpha": 8, "target_modules": ["down_proj"], **settings}),
    )
    torch.manual_seed(seed)
    for name, value in made.named_parameters():
        if "lora_" in name:
            value.data.normal_(0, 0.2)
    made.save_pretrained(folder)
    return made


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Up to float32's rounding, on logits of size 1 to 10."""
    torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.mlp.down_proj": 2}, "alpha_pattern": {"3.mlp.down_proj": 1}},
        {"rank_pattern": {"1.*": 6}, "alpha_pattern": {".*down_proj": 3}, "use_rslora": True},
        {"target_modules": ["down_proj", "o_proj"], "layers_to_transform": [1, 2]},
        {"target_modules": r".*layers\.[02]\..*(down|o)_proj", "lora_dropout": 0.5},
    ],
    ids=["plain", "rslora", "patterns", "patterns with rslora", "some layers", "a pattern"],
)
def test_the_patch_gives_the_adapters_logits(
    tmp_path: Path, wide: Path, settings: dict[str, Any]
) -> None:
    made = adapter(wide, tmp_path / "adapter", **settings).eval()
    found = from_peft(tmp_path / "adapter", wide, tmp_path / "p.st", dtype="float32")
    patch = Patch.read(tmp_path / "p.st")
    assert patch.id == found.patch.id
    close(logits(fold_into(network(wide), patch)), logits(made))
    assert (logits(made) - logits(network(wide))).abs().max() > 0.1
    assert {delta.kind for delta in patch.deltas.values()} == {"additive"}
    assert all(one.error < 1e-6 for one in found.figures.values())


def test_gpt2_whose_weights_are_transposed(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", "gpt2", dtype=torch.float32)
    made = adapter(
        base, tmp_path / "adapter", target_modules=["mlp.c_proj"], fan_in_fan_out=True
    ).eval()
    from_peft(tmp_path / "adapter", base, tmp_path / "p.st", dtype="float32")
    close(logits(fold_into(network(base), Patch.read(tmp_path / "p.st"))), logits(made))


def test_the_manifest_says_what_was_imported(tmp_path: Path, llama: Path) -> None:
    adapter(llama, tmp_path / "adapter", layers_to_transform=[1])
    found = from_peft(tmp_path / "adapter", llama, tmp_path / "p.st", title="from elsewhere")
    manifest = Patch.read(tmp_path / "p.st").manifest
    assert manifest.title == "from elsewhere"
    assert manifest.method.name == "import-peft"
    assert manifest.method.hyperparameters == {"ranks": {down(1): 4}, "scales": {down(1): 2.0}}
    assert (manifest.base.model, manifest.base.architecture) == (llama.name, "LlamaForCausalLM")
    assert manifest.requests.count == 0
    assert manifest.requests.commitment == commitment([], owner_salt())
    assert manifest.evaluation is not None
    one = manifest.evaluation["modules"][down(1)]
    assert one == found.figures[down(1)]._asdict()
    # In bfloat16, rounding takes a little of it: what the file says is what truly is lost.
    assert 0 < one["rounded_error"] < 0.1
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = f"base_model.model.{down(1)}"
    edit = 2.0 * (held[f"{key}.lora_B.weight"].double() @ held[f"{key}.lora_A.weight"].double())
    weight = network(llama).get_submodule(down(1)).weight.data
    served = fold_into(network(llama), found.patch).get_submodule(down(1)).weight.data
    off = (served.double() - weight.double() - edit).norm() / edit.norm()
    assert one["rounded_error"] == pytest.approx(float(off), rel=1e-6)


def test_a_module_whose_product_is_zero_is_left_out(tmp_path: Path, wide: Path) -> None:
    adapter(wide, tmp_path / "adapter", layers_to_transform=[1, 2])
    edit_tensors(tmp_path / "adapter", lambda held: held[key(down(2), "B")].zero_())
    found = from_peft(tmp_path / "adapter", wide, tmp_path / "p.st")
    assert set(found.patch.deltas) == {down(1)}


def test_what_was_exported_comes_back(tmp_path: Path, wide: Path) -> None:
    patch = patch_on(network(wide), {down(1): "multiplicative", down(2): "additive"})
    to_peft([patch], tmp_path / "adapter", wide)
    found = from_peft(tmp_path / "adapter", wide, tmp_path / "p.st", dtype="float32")
    close(logits(fold_into(network(wide), found.patch)), logits(fold_into(network(wide), patch)))


def key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def edit_settings(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file)


def refused(
    tmp_path: Path, model: Path, text: str, kind: type[PatcherError] = ModelError, **wishes: Any
) -> PatcherError:
    with pytest.raises(kind, match=text) as caught:
        from_peft(tmp_path / "adapter", model, tmp_path / "p.st", **wishes)
    assert not (tmp_path / "p.st").exists()
    assert caught.value.cure
    return caught.value


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "type"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"trainable_token_indices": [3]}, "embeddings"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "repeats"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "parameters"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"alpha_pattern": ["down_proj"]}, "alpha_pattern"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "alpha_pattern"),
        ({"alpha_pattern": {".*.*.*down_proj": 1}}, "alpha_pattern"),
        ({"alpha_pattern": {"d*own": 1}}, "alpha_pattern"),
        ({"alpha_pattern": {"down\\": 1}}, "alpha_pattern"),
    ],
)
def test_an_adapter_that_is_more_than_a_lora_is_refused(
    tmp_path: Path, wide: Path, changes: dict[str, Any], text: str
) -> None:
    adapter(wide, tmp_path / "adapter")
    edit_settings(tmp_path / "adapter", **changes)
    refused(tmp_path, wide, text)


def test_an_adapter_of_rank_0_is_refused(tmp_path: Path, wide: Path) -> None:
    adapter(wide, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = load_file(file)
    save_file({n: (t[:0] if "lora_A" in n else t[:, :0]) for n, t in held.items()}, file)
    refused(tmp_path, wide, "rank is 0")


@pytest.mark.parametrize("part", ["q_proj", "v_proj", "gate_proj", "up_proj"])
def test_projections_that_are_served_fused_are_refused_by_name(
    tmp_path: Path, wide: Path, part: str
) -> None:
    adapter(wide, tmp_path / "adapter", target_modules=[part, "down_proj"])
    error = refused(tmp_path, wide, f"layers.0.*{part}.* fused")
    assert "down_proj" in error.cure
    assert down(0) not in error.message


@pytest.mark.parametrize("module", ["lm_head", "model.layers.0.mlp.experts.2.down_proj"])
def test_heads_and_single_experts_are_refused(tmp_path: Path, wide: Path, module: str) -> None:
    adapter(wide, tmp_path / "adapter")

    def rename(held: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            held[key(module, side)] = held.pop(key(down(0), side))

    edit_tensors(tmp_path / "adapter", rename)
    refused(tmp_path, wide, f"{module}.*(mixture|not in a layer)")


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "half a pair": (lambda held: held.pop(key(down(0), "A")), r"layers.0.mlp"),
    "a magnitude": (
        lambda held: held.update({f"{down(0)}.lora_magnitude_vector": torch.ones(2)}),
        "magnitude",
    ),
    "an embedding": (
        lambda held: held.update(
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 2)}
        ),
        "embed_tokens",
    ),
    "a convolution": (
        lambda held: held.update({key(down(0), "A"): torch.ones(4, 64, 1)}),
        "layers.0",
    ),
    "not a number": (
        lambda held: held[key(down(0), "A")].fill_(torch.nan),
        "not finite",
    ),
    "nothing learnt": (
        lambda held: [value.zero_() for name, value in held.items() if "lora_B" in name],
        "changes nothing",
    ),
    "nothing at all": (dict.clear, "changes nothing"),
    "another width": (
        lambda held: held.update({key(down(0), "A"): torch.ones(4, 63)}),
        "32, 63",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_an_adapter_that_is_off_is_refused(tmp_path: Path, wide: Path, name: str) -> None:
    damage, text = DAMAGES[name]
    adapter(wide, tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", damage)
    refused(tmp_path, wide, text)


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path: Path, wide: Path) -> None:
    deeper = {**tiny.FAMILIES["llama"], "num_hidden_layers": 5}
    adapter(tiny.save(tmp_path / "deep", settings=deeper), tmp_path / "adapter")
    refused(tmp_path, wide, "has none")


@pytest.mark.parametrize("what", ["no settings", "no JSON", "a list", "pickled", "cut off"])
def test_files_that_are_not_an_adapters_are_refused(tmp_path: Path, wide: Path, what: str) -> None:
    adapter(wide, tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    if what == "no settings":
        settings.unlink()
    elif what in ("no JSON", "a list"):
        settings.write_text("[]" if what == "a list" else "{")
    elif what == "pickled":
        weights.rename(weights.with_suffix(".bin"))
    else:
        weights.write_bytes(weights.read_bytes()[:-9])
    refused(tmp_path, wide, "can't be read")


def test_wrong_words(tmp_path: Path, wide: Path) -> None:
    adapter(wide, tmp_path / "adapter")
    refused(tmp_path, wide, "dtype", UsageError, dtype="int8")
    with pytest.raises(UsageError, match="no folder"):
        from_peft(tmp_path / "adapter", wide, tmp_path / "nowhere" / "p.st")


def test_an_edit_beyond_the_dtype_is_refused(tmp_path: Path, wide: Path) -> None:
    adapter(wide, tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", lambda held: [v.mul_(1e4) for v in held.values()])
    refused(tmp_path, wide, "not finite in float16", dtype="float16")


@pytest.mark.model
def test_the_real_model_out_and_in_again(tmp_path: Path, real_model: Path) -> None:
    kinds = {down(9): "multiplicative", down(10): "additive"}
    patch = patch_on(network(real_model), kinds, rank=8, scale=0.01)
    to_peft([patch], tmp_path / "adapter", real_model)
    found = from_peft(tmp_path / "adapter", real_model, tmp_path / "p.st")
    one, other = (fold_into(network(real_model), each) for each in (patch, found.patch))
    for name in kinds:
        first, second = (each.get_submodule(name).weight for each in (one, other))
        # R W was rounded to float32 on the way, which now and then turns a last bit.
        assert (first != second).float().mean() < 1e-4
    moved = (logits(one) - logits(network(real_model))).abs().max()
    assert (logits(one) - logits(other)).abs().max() < 0.02 * moved
