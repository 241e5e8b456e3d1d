"""Patches on the real model for engine tests, and checkpoints with patches merged in."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from patcher.patch import (
    Base,
    Delta,
    Manifest,
    Method,
    ModuleBase,
    Patch,
    Requests,
    module_base,
)

LAYERS = (3, 4, 5)


def module_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj"


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def random_patch(
    model: Path,
    seed: int,
    layers: Sequence[int] = LAYERS,
    rank: int = 4,
    scale: float = 0.4,
    title: str = "a random edit",
    base: Mapping[str, torch.Tensor] | None = None,
    **fields: list[str],
) -> Patch:
    """A patch that visibly changes what the model says, without meaning."""
    held = weights(model) if base is None else base
    draw = np.random.default_rng(seed)
    modules, deltas = {}, {}
    for layer in layers:
        name = module_name(layer)
        weight = held[f"{name}.weight"]
        d_out = weight.shape[0]
        left = draw.standard_normal((d_out, rank)).astype(np.float32)
        right = draw.standard_normal((rank, d_out)).astype(np.float32) * (scale / d_out)
        modules[name] = module_base(weight)
        deltas[name] = Delta.multiplicative(left, right)
    return Patch.build(random_manifest(title, modules, seed, **fields), deltas)


def random_manifest(
    title: str, modules: dict[str, ModuleBase], seed: int, **fields: list[str]
) -> Manifest:
    """The manifest of an edit that nobody computed."""
    return Manifest(
        title=title,
        created="2026-11-24T00:00:00Z",
        tool="tests",
        base=Base(model="test", architecture="LlamaForCausalLM", modules=modules),
        method=Method(name="random", hyperparameters={"seed": seed}),
        requests=Requests(count=1, commitment="0" * 64),
        **fields,
    )


def merge(model: Path, patches: Sequence[Patch], folder: Path) -> Path:
    """A checkpoint with ``patches`` folded in, by arithmetic of its own: float64 NumPy."""
    shutil.copytree(model, folder)
    held = weights(model)
    for name in sorted({n for patch in patches for n in patch.deltas}):
        weight = held[f"{name}.weight"]
        folded = weight.double().numpy()
        for patch in patches:
            if name in patch.deltas:
                delta = patch.deltas[name]
                product = delta.left.astype(np.float64) @ delta.right.astype(np.float64)
                folded = folded + (product @ folded if delta.kind == "multiplicative" else product)
        held[f"{name}.weight"] = torch.from_numpy(folded).to(weight.dtype)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder
