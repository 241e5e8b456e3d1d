"""bench/size.py: storing, cutting and weighing a patch of a tiny random model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from patcher.patch import Base, Delta, Manifest, Method, Patch, Requests, module_base
from patcher.patch.compare import Statistics
from patcher.unlearn.models import load
from tests.conftest import REPOSITORY
from tests.unlearn import tiny

sys.path.insert(0, str(REPOSITORY / "bench"))
import size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "tiny")


@pytest.fixture
def patch(folder: Path) -> Patch:
    model, draws = load(folder), np.random.default_rng(0)
    name = model.module_name(1)
    weight = model.served(name)
    manifest = Manifest(
        title="x",
        base=Base(model="t", architecture=model.class_name, modules={name: module_base(weight)}),
        method=Method(name="zero", hyperparameters={}),
        requests=Requests(count=2, commitment="0" * 64),
    )
    left, right = draws.normal(size=(len(weight), 4)), draws.normal(size=(4, len(weight)))
    return Patch.build(manifest, {name: Delta.multiplicative(left, right)})


def test_two_bytes_a_value_are_half_of_four(patch: Patch) -> None:
    (delta,) = patch.deltas.values()
    numbers = delta.left.size + delta.right.size
    for dtype in ("BF16", "F16"):
        smaller = size.stored(patch, dtype)
        assert abs(len(patch.data) - len(smaller.data) - 2 * numbers) <= 16  # the header's own


def test_a_cut_is_no_worse_than_the_patch_without_that_rank(patch: Patch) -> None:
    ((name, delta),) = patch.deltas.items()
    wide = size.stored(patch, "F32")
    unit = Statistics(np.eye(len(delta.left)), np.eye(len(delta.left)))
    one, error = size.cut(wide, 2, {name: unit})
    assert one.deltas[name].rank == 2
    whole, low = (d.left.astype(float) @ d.right for d in (delta, one.deltas[name]))
    singular = np.linalg.svd(whole, compute_uv=False)
    assert np.linalg.norm(whole - low) == pytest.approx(np.sqrt((singular[2:] ** 2).sum()), 1e-4)
    assert error == pytest.approx(np.linalg.norm(whole - low) / np.linalg.norm(whole), 1e-4)
    assert size.cut(wide, 9, {name: unit})[1] == 0.0


def test_an_adapter_of_the_same_delta_weighs_its_dtype(patch: Patch, folder: Path) -> None:
    sizes = size.adapters(patch, str(folder))
    ((name, delta),) = patch.deltas.items()
    d_out, d_in = patch.manifest.base.modules[name].shape
    assert sizes["F32"] - sizes["BF16"] == pytest.approx(2 * delta.rank * (d_out + d_in), abs=16)
    assert size.tensors(patch) == 2 * d_out * d_in


def test_the_bars_are_of_bytes(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"patch": "wide", "of the LoRA": 0.61, "of the tensors": 0.01}
    found = size.checks(2, patch, {"BF16": len(patch.data), "F32": 1, "F16": 1}, [row])
    assert [check.ok for check in found] == [False, False, False, True]
    assert all(check.why for check in found if not check.ok)


def test_larger_models_are_really_written(patch: Patch) -> None:
    small = size.random_sizes("Llama-3.2-3B", 10, patch.manifest)
    assert small["of the LoRA"] == pytest.approx(2 * 3072 / (3072 + 8192), rel=0.02)
    assert torch.tensor(small["of the tensors"]) < size.TENSORS
