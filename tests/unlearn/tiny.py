"""Tiny random models of many families, with a tokenizer made on the spot."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parents[1] / "data"
VOCABULARY = 400
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<assistant> "

_SAME = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
_GPT = {"n_embd": 32, "n_inner": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}
#: model_type -> what its configuration needs beside the vocabulary.
FAMILIES: dict[str, dict[str, Any]] = {
    "falcon": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
    "gemma": {**_SAME, "head_dim": 8},
    "gemma2": {**_SAME, "head_dim": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {**_SAME, "head_dim": 8},
    "gpt2": _GPT,
    "gpt_neox": {k: v for k, v in _SAME.items() if k != "num_key_value_heads"},
    "granite": {**_SAME, "logits_scaling": 3.0},
    "llama": _SAME,
    "mistral": {**_SAME, "head_dim": 8},
    "olmo2": _SAME,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
    },
    "phi": {**_SAME, "partial_rotary_factor": 0.5},
    "phi3": _SAME,
    "qwen2": _SAME,
    "qwen3": {**_SAME, "head_dim": 8},
    "stablelm": _SAME,
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([(DATA / "ppl.txt").read_text("utf-8")[:20000]], trainer)
    untyped: Any = PreTrainedTokenizerFast
    ready: PreTrainedTokenizerFast = untyped(
        tokenizer_object=made, eos_token="<end>", pad_token="<end>", chat_template=TEMPLATE
    )
    return ready


def save(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    settings: dict[str, Any] | None = None,
    seed: int = 5,
) -> Path:
    """Write a random model of that family; the same one at every call.

    ``settings`` of its configuration in place of the family's here.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **{"initializer_range": 0.2, **(settings or FAMILIES[family])},
    )
    maker: Any = AutoModelForCausalLM
    model = maker.from_config(config).to(dtype)
    model.config.dtype = dtype
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
