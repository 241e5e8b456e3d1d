"""A patch for the same weights under other names, or in another dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from patcher.errors import BaseMismatchError, StackConflictError, UsageError
from patcher.export import rebase, to_checkpoint
from patcher.patch import Patch
from tests.cli.running import document, run
from tests.unlearn import tiny

from .making import down, network, patch_on, weight_of, written

KINDS = {down(1): "multiplicative", down(2): "additive"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("wide"), dtype=torch.float32)


def same_edit(one: Patch, other: Patch, names: dict[str, str]) -> bool:
    return all(
        (delta.left == other.deltas[names[name]].left).all()
        and (delta.right == other.deltas[names[name]].right).all()
        for name, delta in one.deltas.items()
    )


def test_to_another_dtype_and_back(wide: Path, tmp_path: Path) -> None:
    """Computed for bfloat16 of a float32 checkpoint, to be served in float32."""
    patch = patch_on(network(wide), KINDS, dtype=torch.bfloat16)
    found = rebase(patch, wide, dtype="float32")
    assert found.dtype == "float32"
    assert found.names == {name: name for name in KINDS}
    assert same_edit(patch, found.patch, found.names)
    assert found.patch.id != patch.id
    assert found.patch.manifest.method.hyperparameters["rebased_from"] == patch.id
    assert found.patch.manifest.evaluation is None
    to_checkpoint([found.patch], tmp_path / "merged", wide)  # its digests are those of the weights
    back = rebase(patch_on(network(wide), KINDS), wide, dtype="bfloat16").patch
    assert back.manifest.base.modules == patch.manifest.base.modules


def test_to_other_names(llama: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for file in llama.iterdir():
        (renamed / file.name).write_bytes(file.read_bytes())
    tensors = load_file(llama / "model.safetensors")
    one, two = (f"{down(layer)}.weight" for layer in (1, 2))
    tensors[one], tensors[two] = tensors[two].clone(), tensors[one].clone()
    save_file(tensors, renamed / "model.safetensors", {"format": "pt"})
    patch = patch_on(network(llama), KINDS)
    found = rebase(patch, renamed)
    assert found.names == {down(1): down(2), down(2): down(1)}
    assert same_edit(patch, found.patch, found.names)
    to_checkpoint([found.patch], tmp_path / "merged", renamed)


def test_the_model_has_other_weights(llama: Path) -> None:
    model = network(llama)
    weight_of(model, down(2))[0, 0] += 1
    with pytest.raises(BaseMismatchError, match="no weights like those"):
        rebase(patch_on(model, KINDS), llama)


def test_what_was_rounded_away_does_not_come_back(llama: Path, wide: Path) -> None:
    """Computed for float32; the checkpoint has only the bfloat16 of it."""
    patch = patch_on(network(wide), KINDS)
    with pytest.raises(BaseMismatchError, match="float32"):
        rebase(patch, llama)


def test_two_modules_have_those_very_weights(llama: Path, tmp_path: Path) -> None:
    doubled = tmp_path / "doubled"
    doubled.mkdir()
    for file in llama.iterdir():
        (doubled / file.name).write_bytes(file.read_bytes())
    tensors = load_file(llama / "model.safetensors")
    one, two, three = (f"{down(layer)}.weight" for layer in (1, 2, 0))
    tensors[two], tensors[three] = tensors[one].clone(), tensors[one].clone()
    tensors[one] = torch.zeros_like(tensors[one])
    save_file(tensors, doubled / "model.safetensors", {"format": "pt"})
    patch = patch_on(network(llama), {down(1): "multiplicative"})
    with pytest.raises(BaseMismatchError, match="several"):
        rebase(patch, doubled)


def test_it_fits_already(llama: Path) -> None:
    with pytest.raises(UsageError, match="as it is"):
        rebase(patch_on(network(llama), KINDS), llama)


def test_it_stands_on_another_patch(llama: Path) -> None:
    patch = patch_on(network(llama), KINDS, requires=("ab" * 32,))
    with pytest.raises(StackConflictError, match="Merge the stack"):
        rebase(patch, llama, dtype="float32")


def test_the_command(wide: Path, tmp_path: Path) -> None:
    patch = patch_on(network(wide), KINDS, dtype=torch.bfloat16)
    file, out = written(patch, tmp_path / "p.st"), tmp_path / "q.st"
    words = ("rebase", file, "--onto", wide, "-o", out)
    told = document(run(*words, "--dtype", "float32", "--json"))
    assert told["id"] == Patch.read(out).id
    assert told["from"] == patch.id
    assert told["modules"] == {name: name for name in KINDS}
    assert told["dtype"] == "float32"
    assert "float32" in run(*words, "--dtype", "float32").stdout
    out.unlink()
    assert run(*words, "--dtype", "int8").exit_code == 2
    assert run(*words, "--dtype", "bfloat16").exit_code == 2, "it fits already"
    assert not out.exists()
