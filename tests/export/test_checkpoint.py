"""``export --checkpoint``: the model with patches folded in, in files that others load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from patcher.errors import (
    BaseMismatchError,
    ModelError,
    NumericalError,
    PatcherError,
    StackConflictError,
    UsageError,
)
from patcher.export import checkpoints, to_checkpoint
from patcher.patch import Patch
from tests.engine import families
from tests.unlearn import tiny

from .making import (
    down,
    fold_into,
    logits,
    network,
    patch_on,
    same_weights,
    sharded,
    weight_of,
    written,
)

NAMES = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "opt": "model.decoder.layers.{}.fc2",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}


def both_kinds(family: str = "llama") -> dict[str, str]:
    name = NAMES.get(family, down(0).replace("0", "{}"))
    return {name.format(1): "multiplicative", name.format(2): "additive"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2", "opt", "gpt_neox"])
def test_transformers_loads_the_weights_that_an_engine_serves(tmp_path: Path, family: str) -> None:
    base = tiny.save(tmp_path / "base", family)
    patch = patch_on(network(base), both_kinds(family))
    found = to_checkpoint([patch], tmp_path / "merged", base)
    merged = network(tmp_path / "merged")
    assert same_weights(merged, fold_into(network(base), patch))
    assert not torch.equal(logits(merged), logits(network(base)))
    assert found.patches == (patch.id,)
    assert found.modules == tuple(both_kinds(family))
    others = {p.name for p in base.iterdir()} - {"model.safetensors"}
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {
        *others, "model.safetensors", "patcher.json",
    }  # fmt: skip
    for name in others:
        assert (base / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    record = json.loads((tmp_path / "merged" / "patcher.json").read_text())
    assert record["patches"] == [patch.id]


def test_a_stack_is_folded_in_its_order(tmp_path: Path, llama: Path) -> None:
    model = network(llama)
    first = patch_on(model, {down(1): "multiplicative", down(2): "additive"}, 1)
    second = patch_on(model, {down(1): "additive", down(2): "multiplicative"}, 2)
    files = [written(first, tmp_path / "a.st"), written(second, tmp_path / "b.st")]
    to_checkpoint(files, tmp_path / "merged", llama)
    merged = network(tmp_path / "merged")
    assert same_weights(merged, fold_into(network(llama), first, second))
    assert not same_weights(merged, fold_into(network(llama), second, first))


def test_of_a_sharded_checkpoint_only_the_patched_bytes_change(tmp_path: Path, llama: Path) -> None:
    base = sharded(tmp_path / "base", llama)
    patch = patch_on(network(base), {down(1): "multiplicative"})
    to_checkpoint([patch], tmp_path / "merged", base)
    assert same_weights(network(tmp_path / "merged"), fold_into(network(base), patch))
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    changed = [
        name
        for name in shards
        if (base / name).read_bytes() != (tmp_path / "merged" / name).read_bytes()
    ]
    index = json.loads((base / checkpoints.INDEX).read_text())["weight_map"]
    assert changed == [index[f"{down(1)}.weight"]]


def test_one_weight_at_a_time_is_read_and_no_other(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    read = checkpoints.Checkpoint.tensor

    def watched(self: Any, name: str) -> torch.Tensor:
        seen.append(name)
        return read(self, name)

    monkeypatch.setattr(checkpoints.Checkpoint, "tensor", watched)
    to_checkpoint([patch_on(network(llama), {down(1): "additive"})], tmp_path / "merged", llama)
    assert set(seen) == {f"{down(1)}.weight"}


@pytest.mark.parametrize("apart", [True, False], ids=["one tensor an expert", "fused"])
def test_a_mixture_of_experts(tmp_path: Path, apart: bool) -> None:
    base = families.save(tmp_path / "base", "qwen3_moe")
    held = load_file(base / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in held
    if not apart:
        name = "model.layers.{}.mlp.experts"
        for layer in (0, 1):
            each = [
                held.pop(f"{name.format(layer)}.{i}.down_proj.weight").clone() for i in range(4)
            ]
            held[f"{name.format(layer)}.down_proj"] = torch.stack(each)
        save_file(held, base / "model.safetensors", {"format": "pt"})
    wanted = network(base)
    patch = families.patch_on(families.targets(wanted))
    families.fold_into(families.targets(wanted), patch)
    to_checkpoint([patch], tmp_path / "merged", base)
    assert same_weights(network(tmp_path / "merged"), wanted)


def test_a_checkpoint_stored_without_its_heads_prefix(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", "gpt2")
    held = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in held.items()}
    assert bare.keys() != held.keys()
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    patch = patch_on(network(base), both_kinds("gpt2"))
    to_checkpoint([patch], tmp_path / "merged", base)
    assert same_weights(network(tmp_path / "merged"), fold_into(network(base), patch))


def test_a_float32_checkpoint_that_is_served_in_bfloat16(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", dtype=torch.float32)
    patch = patch_on(network(base), both_kinds(), dtype=torch.bfloat16)
    to_checkpoint([patch], tmp_path / "merged", base)
    wanted = fold_into(network(base, torch.bfloat16), patch)
    assert same_weights(network(tmp_path / "merged", torch.bfloat16), wanted)
    kept = network(tmp_path / "merged")
    assert kept.dtype == torch.float32
    assert torch.equal(weight_of(kept, down(0)), weight_of(network(base), down(0)))


def test_an_empty_folder_may_be_there(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "merged").mkdir()
    to_checkpoint([patch_on(network(llama), both_kinds())], tmp_path / "merged", llama)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_hub_id(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def snapshot(name: str, ignore_patterns: list[str]) -> str:
        asked.append((name, ignore_patterns))
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    patch = patch_on(network(llama), both_kinds())
    to_checkpoint([patch], tmp_path / "merged", "somebody/model")
    assert same_weights(network(tmp_path / "merged"), fold_into(network(llama), patch))
    assert (
        json.loads((tmp_path / "merged" / "patcher.json").read_text())["base"] == "somebody/model"
    )
    assert asked[0][0] == "somebody/model"


def test_a_hub_id_that_nobody_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot(name: str, ignore_patterns: list[str]) -> str:
        raise OSError("no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelError, match="no such repository"):
        checkpoints.open_checkpoint("somebody/model")


def test_unpatched_weights_in_other_forms_stay_behind(tmp_path: Path, llama: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    (base / "original").mkdir()
    for name in (
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "model.Q4.GGUF",
        ".hidden",
    ):
        (base / name).write_bytes(b"weights that still know")
    (base / "README.md").write_text("a card")
    found = to_checkpoint([patch_on(network(llama), both_kinds())], tmp_path / "merged", base)
    there = {path.name for path in (tmp_path / "merged").iterdir()}
    assert there == {p.name for p in llama.iterdir()} | {"README.md", "patcher.json"}
    assert found.left_out == (
        "consolidated.safetensors",
        "model.Q4.GGUF",
        "original/",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )


def refused(
    tmp_path: Path, kind: type[PatcherError], text: str, patches: list[Patch], model: Path
) -> PatcherError:
    """The export fails in that way, and leaves nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=text) as caught:
        to_checkpoint(patches, tmp_path / "merged", model)
    assert sorted(tmp_path.iterdir()) == before
    assert caught.value.cure
    return caught.value


def test_patches_of_another_model_are_refused(tmp_path: Path, llama: Path) -> None:
    other = network(tiny.save(tmp_path / "other", seed=6))
    refused(tmp_path, BaseMismatchError, "weights of", [patch_on(other, both_kinds())], llama)


def test_the_second_patchs_base_counts_too(tmp_path: Path, llama: Path) -> None:
    other = network(tiny.save(tmp_path / "other", seed=6))
    patches = [patch_on(network(llama), both_kinds()), patch_on(other, both_kinds(), 1)]
    refused(tmp_path, BaseMismatchError, "different weights", patches, llama)


def test_a_module_that_the_model_lacks_is_refused(tmp_path: Path, llama: Path) -> None:
    deeper = {**tiny.FAMILIES["llama"], "num_hidden_layers": 5}
    other = network(tiny.save(tmp_path / "other", settings=deeper))
    patch = patch_on(other, {down(4): "additive"})
    refused(tmp_path, BaseMismatchError, "has no", [patch], llama)


def test_an_order_that_an_engine_refuses_is_refused(tmp_path: Path, llama: Path) -> None:
    model = network(llama)
    lower = patch_on(model, both_kinds())
    upper = patch_on(model, both_kinds(), 1, requires=[lower.id])
    refused(tmp_path, StackConflictError, "requires", [upper, lower], llama)
    refused(tmp_path, StackConflictError, "twice", [lower, lower], llama)
    refused(tmp_path, UsageError, "nothing to export", [], llama)


def test_a_fold_beyond_the_dtype_is_refused(tmp_path: Path) -> None:
    model = network(tiny.save(tmp_path / "small", dtype=torch.float16))
    weight_of(model, down(1)).mul_(5e5)  # beyond it with a gain that a patch may have
    base = tmp_path / "base"
    model.save_pretrained(base)
    patch = patch_on(model, {down(1): "multiplicative"}, scale=1.0)
    refused(tmp_path, NumericalError, "not finite", [patch], base)


def test_a_dtype_that_cannot_hold_the_fold_is_refused(tmp_path: Path, llama: Path) -> None:
    patch = patch_on(network(llama), both_kinds(), dtype=torch.float32)
    refused(tmp_path, ModelError, "can't hold", [patch], llama)


@pytest.mark.parametrize("what", ["full folder", "file", "no parent"])
def test_what_is_there_is_never_written_over(tmp_path: Path, llama: Path, what: str) -> None:
    target = tmp_path / ("nowhere/merged" if what == "no parent" else "merged")
    if what == "full folder":
        target.mkdir()
        (target / "mine").write_text("keep")
    elif what == "file":
        target.write_text("keep")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError):
        to_checkpoint([patch_on(network(llama), both_kinds())], target, llama)
    assert sorted(tmp_path.rglob("*")) == before


def quantise(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def lie_about_a_shape(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    assert b"[32,64]" in data
    file.write_bytes(data.replace(b"[32,64]", b"[64,64]"))


def index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / checkpoints.INDEX).write_text(text)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "quantised": (quantise, "quantised"),
    "truncated": (truncate, "cut off"),
    "another shape": (lie_about_a_shape, "fit its shape"),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 40), "too long"),
    "not JSON": (lambda f: (f / "model.safetensors").write_bytes(b"\2" + b"\0" * 9), "sound"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither"),
    "one file and an index": (lambda f: (f / checkpoints.INDEX).write_text("{}"), "both|differ"),
    "index of nothing": (lambda f: index(f, '{"weight_map": {}}'), "no index"),
    "index that is none": (lambda f: index(f, "[]"), "no index"),
    "index leads outside": (
        lambda f: index(f, '{"weight_map": {"x": "../../secret.safetensors"}}'),
        "no index",
    ),
    "a shard is missing": (
        lambda f: index(f, '{"weight_map": {"x": "model-1.safetensors"}}'),
        "lacks model-1",
    ),
    "adapter beside it": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path: Path, llama: Path, name: str) -> None:
    damage, text = DAMAGES[name]
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    patch = patch_on(network(base), both_kinds())
    damage(base)
    refused(tmp_path, ModelError, text, [patch], base)


@pytest.mark.model
def test_the_real_model(tmp_path: Path, real_model: Path) -> None:
    kinds = {down(9): "multiplicative", down(10): "additive"}
    patch = patch_on(network(real_model), kinds, rank=8, scale=0.01)
    to_checkpoint([patch], tmp_path / "merged", real_model)
    wanted = fold_into(network(real_model), patch)
    merged = network(tmp_path / "merged")
    assert same_weights(merged, wanted)
    assert torch.equal(logits(merged), logits(wanted))
