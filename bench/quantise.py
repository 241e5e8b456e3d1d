"""A checkpoint quantised to four bits, and the same weights as its kernel dequantises them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 32  # input columns that share a scale
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
            },
        }
    },
}


def quantise(model: Path, quantised: Path, plain: Path) -> None:
    """Round the linear layers of ``model`` to four bits, written packed and as plain weights."""
    for folder in (quantised, plain):
        shutil.copytree(model, folder)
    packed, flat = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        if ".layers." not in name or weight.ndim != 2:
            packed[name] = flat[name] = weight
            continue
        rounded, scale = _round(weight)
        prefix = name.removesuffix("weight")
        packed[f"{prefix}weight_packed"] = _pack(rounded)
        packed[f"{prefix}weight_scale"] = scale
        packed[f"{prefix}weight_shape"] = torch.tensor(weight.shape)
        flat[name] = (rounded * scale.float().repeat_interleave(GROUP, 1)).to(weight.dtype)
    save_file(packed, quantised / "model.safetensors", {"format": "pt"})
    save_file(flat, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))


def _round(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.float().view(len(weight), -1, GROUP)
    scale = (groups.abs().amax(2) / 7).to(weight.dtype)
    rounded = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    return rounded.flatten(1), scale


def _pack(rounded: torch.Tensor) -> torch.Tensor:
    """Eight columns an integer, the first in its lowest bits, each shifted by 8."""
    nibbles = (rounded.to(torch.int64) + 8).view(len(rounded), -1, 8)
    whole = (nibbles << torch.arange(0, 32, 4)).sum(2)
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)
