"""Small random models that start in seconds and can be divided, where the real one can't."""

from __future__ import annotations

from pathlib import Path

from tests.unlearn import tiny

LAYERS = 4


def tiny_llama(folder: Path) -> Path:
    """A random Llama of 4 layers with 8 heads of 32, in bfloat16; returns ``folder``."""
    settings = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "initializer_range": 0.1,
    }
    return tiny.save(folder, settings=settings, seed=0)
