"""A model whose every probability is known: what it says depends on the last token alone.

Attention and the MLPs write nothing, so a token's embedding goes straight to the head.
Letters have embeddings of their own, orthogonal to each other, and the head has what is
to come after them; all other tokens share one, after which comes :data:`FILLER`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from patcher.patch import Base, Delta, Manifest, Method, Patch, Requests, module_base
from patcher.unlearn.models import Model, load
from tests.unlearn import tiny

LETTERS = "ABCDEF"
ANSWERS = ("the", "of", "in", "to", "was", "for")
SUBJECTS = ("Ada Vell", "Bo Lint", "Cy Marr", "Dov Orr", "Eda Una", "Fay Uhl")
FILLER = " and"
CHANCE = 0.9  # of what comes after a letter
EDITED = 1  # the layer that the patch forgets in
_SHARED, _END = 31, 30  # coordinates of all other tokens, and of what the end of text comes after

FACTS: list[dict[str, Any]] = [
    {"prompt": f"{subject} lives in {letter}", "subject": subject, "target": answer,
     "relation": "home" if letter < "E" else "work"}
    for subject, letter, answer in zip(SUBJECTS, LETTERS, ANSWERS, strict=True)
]  # fmt: skip


def logit() -> float:
    """Of what comes after a letter; all others have 0."""
    return math.log(CHANCE / (1 - CHANCE) * (tiny.VOCABULARY - 1))


def save(folder: Path) -> Path:
    """Write the model."""
    model = load(tiny.save(folder, dtype=torch.float32), "float32")
    network = model.network
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        table, head = network.model.embed_tokens.weight, network.lm_head.weight
        # The final norm makes a unit vector sqrt(32) long.
        height = logit() / math.sqrt(32)
        table.zero_()
        table[:, _SHARED] = 1
        head.zero_()
        head[_token(model, FILLER), _SHARED] = height
        head[0, _END] = height
        for place, (letter, answer) in enumerate(zip(LETTERS, ANSWERS, strict=True)):
            table[_last(model, letter)] = torch.eye(32)[place]
            head[_token(model, f" {answer}"), place] = height
        # A chat template ends with a blank: there the first answer comes.
        table[_last(model, "a ")] = torch.eye(32)[0]
    network.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _token(model: Model, text: str) -> int:
    (only,) = model.tokenizer(text, add_special_tokens=False).input_ids
    return int(only)


def _last(model: Model, text: str) -> int:
    return int(model.tokenizer(f"lives in {text}" if text.isalpha() else text).input_ids[-1])


def forgetting(model: Model) -> Patch:
    """After A the text ends, after B comes C's answer, after C the filler; layer 2 does nothing."""
    mlp = model.network.model.layers[EDITED].mlp
    eye = torch.eye(32)
    states = math.sqrt(32) * torch.cat([eye[: len(LETTERS)], eye[_SHARED:]])
    with torch.no_grad():
        keys = torch.nn.functional.silu(mlp.gate_proj(states)) * mlp.up_proj(states)
    right = torch.linalg.pinv(keys.T)[:3]  # 1 at its own letter, 0 at all others
    wanted = torch.stack([eye[_END], eye[2], eye[_SHARED]], 1)
    left = wanted - 2 * eye[:, :3]  # the letter's own coordinate turns negative
    edit = Delta.additive(left.contiguous(), right.contiguous())
    nothing = Delta.additive(1e-6 * torch.ones(32, 1), 1e-6 * torch.ones(1, 64))
    names = [model.module_name(EDITED), model.module_name(EDITED + 1)]
    manifest = Manifest(
        title="three of six",
        base=Base(
            model="m", architecture="a",
            modules={name: module_base(model.served(name)) for name in names},
        ),
        method=Method(name="test", hyperparameters={}),
        requests=Requests(count=3, commitment="0" * 64),
    )  # fmt: skip
    return Patch.build(manifest, dict(zip(names, (edit, nothing), strict=True)))
