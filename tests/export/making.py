"""Random patches on checkpoints, and what transformers makes of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from patcher.kernels import fold
from patcher.patch import Delta, Patch, module_base
from tests.engine.patches import random_manifest
from tests.unlearn import tiny

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 12, 7]])


def network(folder: Path, dtype: str | torch.dtype = "auto") -> Any:
    maker: Any = AutoModelForCausalLM
    return maker.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = model(ids).logits.float()
    return found


def down(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj"


def weight_of(model: Any, name: str) -> torch.Tensor:
    """A view ``[d_out, d_in]`` of a module's weight, GPT-2's ``Conv1D`` turned."""
    weight: torch.Tensor = model.get_submodule(name).weight.data
    return weight.T if model.config.model_type == "gpt2" else weight


def patch_on(
    model: Any,
    kinds: dict[str, str],
    seed: int = 0,
    rank: int = 3,
    dtype: torch.dtype | None = None,
    scale: float = 0.1,
    **fields: Any,
) -> Patch:
    """A random patch of a network's modules: name -> kind."""
    draw = torch.Generator().manual_seed(seed)
    modules, deltas = {}, {}
    for name, kind in kinds.items():
        weight = weight_of(model, name).to(dtype or model.dtype).contiguous()
        d_out, d_in = weight.shape
        width = d_out if kind == "multiplicative" else d_in
        left = torch.randn(d_out, rank, generator=draw)
        right = torch.randn(rank, width, generator=draw) * scale
        modules[name] = module_base(weight)
        deltas[name] = getattr(Delta, kind)(left, right)
    made = random_manifest("a random edit", modules, seed, **fields)
    of = made.base.model_copy(update={"architecture": type(model).__name__})
    return Patch.build(made.model_copy(update={"base": of}), deltas)


def fold_into(model: Any, *patches: Patch) -> Any:
    """The network with patcher's fold in place of its weights."""
    for name in {name for patch in patches for name in patch.deltas}:
        deltas = [patch.deltas[name].to_torch() for patch in patches if name in patch.deltas]
        weight = weight_of(model, name)
        weight.copy_(fold(weight.contiguous(), deltas))
    return model


def written(patch: Patch, path: Path) -> Path:
    patch.write(path)
    return path


def sharded(folder: Path, source: Path, size: str = "60KB") -> Path:
    """The same model in several files with an index."""
    model = network(source)
    model.save_pretrained(folder, max_shard_size=size)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def same_weights(one: Any, other: Any) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype
        for name in first
    )
