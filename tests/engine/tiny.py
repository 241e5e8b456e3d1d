"""A random Llama of two layers: what a test needs that doesn't care what is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

LAYERS = (0, 1)


def tiny_llama(folder: Path, tokenizer: Path, seed: int = 0) -> Path:
    """A checkpoint in bfloat16 with the tokenizer of the model in ``tokenizer``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=len(LAYERS),
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        initializer_range=0.1,  # large enough that the context decides what comes next
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special", "chat_template", "vocab", "merges")):
            shutil.copy(file, folder)
    return folder
