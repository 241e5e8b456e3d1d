"""Patches as a LoRA adapter in PEFT's layout, which PEFT, vLLM and others load.

``W + L (R W)`` is a LoRA with ``B = L`` and ``A = R W``; an additive delta ``W + A B`` is one
with ``B = A`` and ``A = B``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import NumericalError, UsageError
from ..kernels import LowRank
from ..kernels import compose as composed
from ..patch import ModuleBase, Patch
from .checkpoints import Checkpoint, open_checkpoint
from .folders import base_weight, bases_of, new_folder, read_stack

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
_CONV1D = ("GPT2LMHeadModel",)  # classes that store weights [d_in, d_out]


@dataclass(frozen=True)
class Adapter:
    """An adapter that was written. ``modules``: the rank that each needs, of ``rank`` for all."""

    path: Path
    patches: tuple[str, ...]
    modules: Mapping[str, int]
    rank: int
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """As ``patcher export --peft --json`` prints it."""
        return {
            "kind": "peft",
            "path": str(self.path),
            "patches": list(self.patches),
            "modules": dict(self.modules),
            "rank": self.rank,
            "bytes": self.bytes,
        }


def to_peft(
    patches: Sequence[str | os.PathLike[str] | Patch],
    target: str | os.PathLike[str],
    model: str | Path | None = None,
) -> Adapter:
    """Write the patches, the bottom of the stack first, as one LoRA adapter.

    Factors are float32. All modules have one rank, the largest that one needs, the others
    filled with zeros, so that a reader that knows only one ``r`` loads it too; ``lora_alpha``
    is that rank, so nothing is scaled.

    Args:
        target: a folder that doesn't exist yet, or an empty one.
        model: a directory or a hub id; needed where a patch is multiplicative.

    Raises:
        UsageError: no patch, no model where one is needed, a mixture's experts, or ``target``
            can't be written.
        InvalidPatchError: a file is damaged.
        StackConflictError: an engine wouldn't take these patches in this order.
        BaseMismatchError: a patch was computed on other weights.
        ModelError: the checkpoint can't be read.
        NumericalError: a factor is not finite in float32.
    """
    stack = read_stack(patches)
    bases = bases_of(stack)
    _check_experts(bases)
    _check_model(stack, model)
    checkpoint = None if model is None else open_checkpoint(model)
    pairs = {name: _pair(name, base, stack, checkpoint) for name, base in bases.items()}
    ranks = {name: pair.left.shape[1] for name, pair in pairs.items()}
    rank = max(ranks.values())
    tensors = {
        f"{PREFIX}{name}.lora_{side}.weight": matrix
        for name, pair in pairs.items()
        for side, matrix in _padded(name, pair, rank).items()
    }
    with new_folder(target) as folder:
        from safetensors.torch import save_file

        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        settings = _settings(stack[0], list(pairs), rank)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
    return Adapter(Path(target), tuple(patch.id for patch in stack), ranks, rank, size)


def additive(deltas: Sequence[LowRank], weight: torch.Tensor | None) -> LowRank:
    """One additive delta, float64, that does on ``weight`` what ``deltas`` do, the first first.

    ``weight`` ``[d_out, d_in]`` may be left out where all are additive.
    """
    parts: list[LowRank] = []
    for delta in deltas:
        if delta.kind == "multiplicative":
            assert weight is not None  # which the caller asked for
            R = delta.right.double()
            right = R @ weight.double()
            if parts:  # it acts on what those beneath have added too
                below = composed(parts)
                right += (R @ below.left) @ below.right
            delta = LowRank("additive", delta.left.double(), right)
        parts.append(delta)
    return composed(parts)


def _pair(
    name: str, base: ModuleBase, stack: Sequence[Patch], checkpoint: Checkpoint | None
) -> LowRank:
    deltas = [patch.deltas[name].to_torch() for patch in stack if name in patch.deltas]
    weight = None if checkpoint is None else base_weight(checkpoint, name, base)
    if all(delta.kind == "multiplicative" for delta in deltas):
        deltas = [composed(deltas)]
    return additive(deltas, weight)


def _padded(name: str, pair: LowRank, rank: int) -> dict[str, torch.Tensor]:
    """``lora_A [rank, d_in]`` and ``lora_B [d_out, rank]``, float32."""
    d_out, own = pair.left.shape
    A = torch.zeros(rank, pair.right.shape[1])
    B = torch.zeros(d_out, rank)
    A[:own], B[:, :own] = pair.right.float(), pair.left.float()
    if not (A.isfinite().all() and B.isfinite().all()):
        raise NumericalError(
            f"As a LoRA, {name} has values that are not finite in float32.",
            "Export fewer patches at once, or a checkpoint: --checkpoint.",
        )
    return {"A": A, "B": B}


def _check_experts(bases: Mapping[str, ModuleBase]) -> None:
    experts = next((name for name in bases if ".experts." in f"{name}."), None)
    if experts is not None:
        raise UsageError(
            f"{experts} is all experts of a mixture at once, which no LoRA adapter that both"
            " PEFT and vLLM load can hold.",
            "Export a checkpoint instead: --checkpoint DIR --model DIR_OR_HUB_ID.",
        )


def _check_model(stack: Sequence[Patch], model: str | Path | None) -> None:
    kinds = {delta.kind for patch in stack for delta in patch.deltas.values()}
    if model is None and "multiplicative" in kinds:
        raise UsageError(
            "A multiplicative patch becomes a LoRA only together with the weights it acts on.",
            "Name the model too: --model DIR_OR_HUB_ID.",
        )


def _settings(patch: Patch, modules: list[str], rank: int) -> dict[str, Any]:
    """``adapter_config.json``: what PEFT 0.21 and vLLM 0.32 read, the rest left to defaults."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": patch.manifest.base.model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(modules),  # whole names: none fits another module's end
        "fan_in_fan_out": patch.manifest.base.architecture in _CONV1D,
    }
