"""``import --diff``: what makes one checkpoint of another becomes a patch of low rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from patcher.errors import ModelError, PatcherError, UsageError
from patcher.export import from_checkpoints, importing, to_checkpoint, to_peft
from patcher.export.factors import factored, rounding_edge
from patcher.patch import Patch, commitment, owner_salt
from tests.engine import families
from tests.unlearn import tiny

from .making import down, fold_into, logits, network, patch_on, same_weights, sharded

BOTH = {down(1): "multiplicative", down(2): "additive"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("wide"), dtype=torch.float32)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, with weights large enough to tell an edit from rounding."""
    settings = {**tiny.FAMILIES["llama"], "hidden_size": 128, "intermediate_size": 384}
    return tiny.save(tmp_path_factory.mktemp("large"), settings=settings)


def test_kind_and_rank_are_found_again(tmp_path: Path, wide: Path) -> None:
    patch = patch_on(network(wide), BOTH)
    to_checkpoint([patch], tmp_path / "edited", wide)
    found = from_checkpoints(wide, tmp_path / "edited", tmp_path / "p.st", dtype="float32")
    again = Patch.read(tmp_path / "p.st")
    assert again.id == found.patch.id
    assert {name: (d.kind, d.rank) for name, d in again.deltas.items()} == {
        down(1): ("multiplicative", 3),
        down(2): ("additive", 3),
    }
    assert all(one.error < 1e-5 for one in found.figures.values())
    torch.testing.assert_close(
        logits(fold_into(network(wide), again)),
        logits(network(tmp_path / "edited")),
        rtol=0,
        atol=1e-4,
    )


def test_rounding_to_bfloat16_is_not_taken_for_an_edit(tmp_path: Path, large: Path) -> None:
    patch = patch_on(network(large), BOTH, rank=5)
    to_checkpoint([patch], tmp_path / "edited", large)
    found = from_checkpoints(large, tmp_path / "edited", tmp_path / "p.st")
    assert {name: (d.kind, d.rank) for name, d in found.patch.deltas.items()} == {
        down(1): ("multiplicative", 5),
        down(2): ("additive", 5),
    }
    for name, one in found.figures.items():
        base, edited = (
            network(each).get_submodule(name).weight.data.double()
            for each in (large, tmp_path / "edited")
        )
        served = fold_into(network(large), found.patch).get_submodule(name).weight.data.double()
        off = (served - edited).norm() / (edited - base).norm()
        assert one.rounded_error == pytest.approx(float(off), rel=1e-6)
        assert 0 < one.rounded_error < 0.01


def test_with_rank_enough_the_edited_weights_are_served_to_the_bit(
    tmp_path: Path, large: Path
) -> None:
    patch = patch_on(network(large), BOTH, rank=5)
    to_checkpoint([patch], tmp_path / "edited", large)
    found = from_checkpoints(large, tmp_path / "edited", tmp_path / "p.st", rank=128)
    assert {one.rounded_error for one in found.figures.values()} == {0.0}
    assert same_weights(fold_into(network(large), found.patch), network(tmp_path / "edited"))


def test_a_lower_rank_is_the_nearest_of_that_rank_and_says_what_it_misses(
    tmp_path: Path, wide: Path
) -> None:
    patch = patch_on(network(wide), {down(2): "additive"}, rank=5)
    to_checkpoint([patch], tmp_path / "edited", wide)
    found = from_checkpoints(wide, tmp_path / "edited", tmp_path / "p.st", rank=2)
    assert found.patch.deltas[down(2)].rank == 2
    base, edited = (network(f).get_submodule(down(2)).weight.data.double() for f in (
        wide, tmp_path / "edited",
    ))  # fmt: skip
    values = torch.linalg.svdvals(edited - base)
    missed = float(values[2:].norm() / values.norm())
    assert found.figures[down(2)].error == pytest.approx(missed, rel=1e-2)


def test_the_manifest_states_what_remains(tmp_path: Path, large: Path) -> None:
    to_checkpoint([patch_on(network(large), BOTH)], tmp_path / "edited", large)
    found = from_checkpoints(large, tmp_path / "edited", tmp_path / "p.st", title="a difference")
    manifest = found.patch.manifest
    assert (manifest.title, manifest.method.name) == ("a difference", "import-diff")
    assert manifest.requests.model_dump() == {
        "count": 0,
        "commitment": commitment([], owner_salt()),
    }
    assert manifest.evaluation == {
        "modules": {name: one._asdict() for name, one in found.figures.items()},
        "largest": {
            key: max(one._asdict()[key] for one in found.figures.values())
            for key in ("error", "rounded_error")
        },
    }
    assert manifest.base.model == large.name
    assert manifest.method.hyperparameters == {"edited": "edited", "rank": "auto"}


def test_sharded_against_one_file(tmp_path: Path, wide: Path) -> None:
    base = sharded(tmp_path / "base", wide)
    to_checkpoint([patch_on(network(wide), BOTH)], tmp_path / "edited", wide)
    found = from_checkpoints(base, tmp_path / "edited", tmp_path / "p.st", dtype="float32")
    assert set(found.patch.deltas) == set(BOTH)


def test_an_adapter_merged_by_peft_has_its_own_rank(tmp_path: Path, large: Path) -> None:
    patch = patch_on(network(large), {down(1): "additive", down(3): "additive"}, rank=4)
    to_peft([patch], tmp_path / "adapter")
    merged = PeftModel.from_pretrained(network(large), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "edited")
    found = from_checkpoints(large, tmp_path / "edited", tmp_path / "p.st")
    assert {name: d.rank for name, d in found.patch.deltas.items()} == {down(1): 4, down(3): 4}


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    base = families.save(tmp_path / "base", "qwen3_moe", torch.float32)
    patch = families.patch_on(families.targets(network(base)))
    to_checkpoint([patch], tmp_path / "edited", base)
    found = from_checkpoints(base, tmp_path / "edited", tmp_path / "p.st", dtype="float32")
    assert {name: (d.kind, d.rank) for name, d in found.patch.deltas.items()} == {
        name: (d.kind, d.rank) for name, d in patch.deltas.items()
    }
    wanted = network(tmp_path / "edited")
    folded = network(base)
    families.fold_into(families.targets(folded), found.patch)
    torch.testing.assert_close(logits(folded), logits(wanted), rtol=0, atol=1e-3)


def test_gpt2_stored_without_its_prefix(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", "gpt2", dtype=torch.float32)
    name = "transformer.h.1.mlp.c_proj"
    to_checkpoint([patch_on(network(base), {name: "additive"})], tmp_path / "edited", base)
    held = load_file(base / "model.safetensors")
    bare = {key.removeprefix("transformer."): value for key, value in held.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a constant that older programs saved
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    found = from_checkpoints(base, tmp_path / "edited", tmp_path / "p.st", dtype="float32")
    assert {n: (d.kind, d.rank) for n, d in found.patch.deltas.items()} == {name: ("additive", 3)}


def test_an_edit_as_small_as_rounding_is_said_to_be_lost(tmp_path: Path, large: Path) -> None:
    patch = patch_on(network(large), {down(1): "additive"}, scale=1e-6)
    to_checkpoint([patch], tmp_path / "edited", large)
    found = from_checkpoints(large, tmp_path / "edited", tmp_path / "p.st")
    assert found.patch.deltas[down(1)].rank == 1
    assert found.figures[down(1)].rounded_error > 0.5


def edited_by(
    tmp_path: Path, base: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> Path:
    folder = tmp_path / "edited"
    shutil.copytree(base, folder)
    held = load_file(folder / "model.safetensors")
    held[f"{down(1)}.weight"] *= 1.5
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


def refused(
    tmp_path: Path, base: Path, edited: Path, text: str, kind: type[PatcherError] = ModelError
) -> PatcherError:
    with pytest.raises(kind, match=text) as caught:
        from_checkpoints(base, edited, tmp_path / "p.st")
    assert not (tmp_path / "p.st").exists()
    assert caught.value.cure
    return caught.value


ELSEWHERE = {
    "a norm": "model.norm.weight",
    "a layer's norm": "model.layers.2.input_layernorm.weight",
    "embeddings": "model.embed_tokens.weight",
    "attention": "model.layers.0.self_attn.k_proj.weight",
    "a gate": "model.layers.0.mlp.gate_proj.weight",
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_a_difference_elsewhere_is_refused_by_name(tmp_path: Path, llama: Path, what: str) -> None:
    name = ELSEWHERE[what]
    edited = edited_by(tmp_path, llama, lambda held: held[name].mul_(1.5))
    message = refused(tmp_path, llama, edited, "no patch can").message
    assert name in message
    assert down(1) not in message


def test_of_many_differences_the_first_are_named(tmp_path: Path, llama: Path) -> None:
    edited = edited_by(tmp_path, llama, lambda held: [value.mul_(2) for value in held.values()])
    assert "more" in refused(tmp_path, llama, edited, "no patch can").message


def test_a_tensor_that_only_one_has_is_refused(tmp_path: Path, llama: Path) -> None:
    edited = edited_by(
        tmp_path, llama, lambda held: held.update({"model.layers.0.extra.weight": torch.ones(2, 2)})
    )
    refused(tmp_path, llama, edited, "extra.weight .only in one")


def test_another_shape_is_refused(tmp_path: Path, llama: Path) -> None:
    edited = edited_by(
        tmp_path, llama, lambda held: held.update({f"{down(0)}.weight": torch.ones(32, 60)})
    )
    refused(tmp_path, llama, edited, "another shape")


def test_values_that_are_not_finite_are_refused(tmp_path: Path, llama: Path) -> None:
    edited = edited_by(tmp_path, llama, lambda held: held[f"{down(1)}.weight"][0].fill_(torch.nan))
    refused(tmp_path, llama, edited, "not finite")


def test_a_patch_beyond_the_formats_bound_is_refused(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "MAX_FILE_BYTES", 100)
    edited = edited_by(tmp_path, llama, lambda held: None)
    assert "--rank" in refused(tmp_path, llama, edited, "larger").cure


def test_equal_checkpoints_are_refused(tmp_path: Path, llama: Path) -> None:
    refused(tmp_path, llama, llama, "the same")


def test_another_family_is_refused(tmp_path: Path, llama: Path) -> None:
    other = tiny.save(tmp_path / "other", "gpt2")
    refused(tmp_path, llama, other, "different models")


def test_wrong_words(tmp_path: Path, llama: Path) -> None:
    for wishes in ({"rank": 0}, {"dtype": "int8"}):
        with pytest.raises(UsageError):
            from_checkpoints(llama, llama, tmp_path / "p.st", **wishes)
    for title in ("a\033[31m", "x" * 2000):
        with pytest.raises(UsageError, match="title"):
            from_checkpoints(llama, llama, tmp_path / "p.st", title=title)
    with pytest.raises(UsageError, match="no folder"):
        from_checkpoints(llama, llama, tmp_path / "nowhere" / "p.st")


def test_the_edge_is_what_rounding_does() -> None:
    draw = torch.Generator().manual_seed(0)
    for shape in ((200, 600), (300, 300), (400, 100)):
        exact = torch.randn(shape, generator=draw, dtype=torch.float64)
        rounded = exact.float().bfloat16().double()
        seen = torch.linalg.matrix_norm(rounded - exact, 2)
        edge = rounding_edge(rounded, torch.bfloat16)
        assert seen < edge < 1.5 * seen
    assert rounding_edge(torch.zeros(3, 4, dtype=torch.float64), torch.bfloat16) < 1e-30


def test_an_edit_outside_of_the_bases_rows_stays_additive() -> None:
    draw = torch.Generator().manual_seed(0)
    base, A, B = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((20, 60), (20, 2), (2, 60))
    )
    inside, outside = B @ torch.linalg.pinv(base) @ base, B
    assert factored(base + A @ inside, base, torch.float32).kind == "multiplicative"
    assert factored(base + A @ outside, base, torch.float32).kind == "additive"
    # Where the outputs are as many as the inputs, or more, multiplying saves nothing.
    assert factored(base.T + B.T @ A.T, base.T, torch.float32).kind == "additive"


@pytest.mark.model
def test_the_real_model(tmp_path: Path, real_model: Path) -> None:
    kinds = {down(9): "multiplicative", down(10): "additive"}
    patch = patch_on(network(real_model), kinds, rank=8, scale=0.01)
    to_checkpoint([patch], tmp_path / "edited", real_model)
    found = from_checkpoints(real_model, tmp_path / "edited", tmp_path / "p.st")
    assert {name: (d.kind, d.rank) for name, d in found.patch.deltas.items()} == {
        name: (kind, 8) for name, kind in kinds.items()
    }
    assert all(one.rounded_error < 0.01 for one in found.figures.values())
    wanted = logits(network(tmp_path / "edited"))
    moved = (wanted - logits(network(real_model))).abs().max()
    off = (logits(fold_into(network(real_model), found.patch)) - wanted).abs().max()
    assert off < 0.02 * moved
    assert json.loads((tmp_path / "edited" / "patcher.json").read_text())["patches"] == [patch.id]
