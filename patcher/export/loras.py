"""A LoRA adapter in PEFT's layout as an additive patch."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ModelError
from ..patch import Delta, module_base
from ..patch.manifest import MAX_NAME
from ..unlearn.progress import Progress, Silent
from .adapters import PREFIX, SETTINGS, WEIGHTS
from .checkpoints import Checkpoint, open_checkpoint
from .importing import Imported, check_wishes, figures, named, reason_against, write_patch

_KEY = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Of PEFT 0.21's settings those that make an adapter more, or other, than W + s B A.
_OTHER = {
    "use_dora": "scales the weights' columns too (DoRA)",
    "lora_bias": "has biases",
    "modules_to_save": "replaces whole modules",
    "trainable_token_indices": "replaces embeddings",
    "target_parameters": "acts on parameters that are no linear layer's",
    "layer_replication": "repeats layers",
    "alora_invocation_tokens": "acts on some tokens only (aLoRA)",
    "use_qalora": "pools its inputs (QALoRA)",
    "use_bdlora": "is block-diagonal (BD-LoRA)",
    "velora_config": "is a VeLoRA",
    "monteclora_config": "is a MonteCLoRA",
    "arrow_config": "routes between adapters",
    "kasa_config": "is a KaSA",
}
# These change the base when the adapter is loaded; the others only set its first values.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


class _Lora(NamedTuple):
    """``W + scale up down``; up ``[d_out, r]``, down ``[r, d_in]``."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float


def from_peft(
    folder: str | os.PathLike[str],
    model: str | Path,
    output: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    title: str | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Write a patch that does on ``model`` what the adapter does, rounded as it is served.

    The scaling (``lora_alpha``, ``rank_pattern``, ``alpha_pattern``, rsLoRA) is multiplied into
    ``A``; factors are stored in float32.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: what the adapter was trained on: a directory or a hub id.
        dtype: what the model is served in; ``auto`` as for ``compute``.

    Raises:
        ModelError: the adapter is damaged, is more than a LoRA, changes nothing or what an
            engine can't patch; or the model can't be read, or isn't the adapter's.
        UsageError: an unknown dtype, or the place can't be written.
        InvalidPatchError: the patch would break a bound of the format.
    """
    told = progress or Silent()
    check_wishes(output, title)
    settings = _settings(Path(folder))
    loras = _loras(Path(folder), settings)
    _check_modules(loras)
    checkpoint = open_checkpoint(model)
    served = checkpoint.served(dtype)
    bases, deltas, found = {}, {}, {}
    told.start("importing", len(loras))
    for done, (name, lora) in enumerate(sorted(loras.items()), 1):
        weight = _weight(checkpoint, name, lora).to(served).contiguous()
        delta = Delta.additive(lora.up.double() * lora.scale, lora.down)
        wanted = weight.double() + lora.scale * (lora.up.double() @ lora.down.double())
        bases[name], deltas[name] = module_base(weight), delta
        found[name] = figures(wanted, weight, delta)
        told.step(done)
    told.finish()
    return write_patch(
        checkpoint,
        output,
        method="import-peft",
        hyperparameters={
            "ranks": {name: delta.rank for name, delta in deltas.items()},
            "scales": {name: loras[name].scale for name in deltas},
        },
        title=title or "An imported LoRA adapter",
        bases=bases,
        deltas=deltas,
        found=found,
    )


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(
            f"{folder / SETTINGS} can't be read: {reason}.", "Give the folder of a PEFT adapter."
        ) from None
    start = settings.get("init_lora_weights", True)
    wrong = [text for name, text in _OTHER.items() if settings.get(name)]
    if settings.get("peft_type") != "LORA":
        wrong.insert(0, f"is of type {ascii(settings.get('peft_type'))[:40]}")
    if settings.get("bias", "none") != "none":
        wrong.append("changes biases")
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        wrong.append(f"changes the base's weights when it is loaded ({ascii(start)[:40]})")
    if wrong:
        raise ModelError(
            f"The adapter is no plain LoRA: it {', '.join(wrong)}.",
            "Merge it into the model with PEFT (merge_and_unload), save that, and import the"
            " difference: patcher import --diff BASE EDITED.",
        )
    return settings


def _loras(folder: Path, settings: Mapping[str, Any]) -> dict[str, _Lora]:
    tensors = _tensors(folder)
    sides: dict[str, dict[str, torch.Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2 or not tensor.is_floating_point():
            strange.append(key)
        else:
            sides.setdefault(match["module"], {})[match["side"]] = tensor
    strange += [name for name, one in sides.items() if len(one) != 2]
    if strange:
        raise ModelError(
            f"The adapter holds what is no LoRA of a linear layer: {named(sorted(strange))}.",
            "Only pairs of lora_A.weight and lora_B.weight can become a patch.",
        )
    found = {
        name: _Lora(one["B"], one["A"], _scale(settings, name, len(one["A"])))
        for name, one in sides.items()
    }
    if not all(torch.isfinite(part).all() for one in found.values() for part in one[:2]):
        raise ModelError("The adapter has values that are not finite.", "Train it again.")
    changing = {name: one for name, one in found.items() if one.up.any() and one.down.any()}
    if not changing:
        raise ModelError("The adapter changes nothing: all its products are zero.", "Train it.")
    return changing


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(
            f"{folder / WEIGHTS} can't be read: {str(error)[:200]}.",
            "Save the adapter in safetensors: what was pickled is not opened here.",
        ) from None


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor that PEFT multiplies the module's product by."""
    alpha = settings.get("lora_alpha")
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(_is_simple, patterns)):
        # PEFT takes any regular expression; a stranger's could take for ever.
        raise ModelError(
            "The adapter's alpha_pattern has more than names of modules with `.*` in them.",
            "Write each module's name in full in adapter_config.json.",
        )
    if len(module) <= MAX_NAME:
        fits = (p for p in patterns if re.match(rf"(.*\.)?({p})$", module))  # get_pattern_key
        alpha = patterns.get(next(fits, ""), alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
        raise ModelError("The adapter's lora_alpha is no number.", "Mend adapter_config.json.")
    if rank < 1:
        raise ModelError(f"The adapter has nothing for {module}: its rank is 0.", "Train it.")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _is_simple(pattern: str) -> bool:
    """Whether matching takes a time that is a low power of a name's length: two ``.*`` at most."""
    stars = pattern.count("*")
    if not re.fullmatch(r"[\w.*^$\\]{1,256}", pattern) or stars > min(2, pattern.count(".*")):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _check_modules(loras: Mapping[str, _Lora]) -> None:
    against = {name: reason_against(name) for name in sorted(loras)}
    refused = [name for name, reason in against.items() if reason]
    if refused:
        raise ModelError(
            f"The adapter changes what no patch can: {named(refused)}. The first"
            f" {against[refused[0]]}.",
            "Train it on modules that are served by themselves: target_modules=['down_proj'],"
            " with 'o_proj' if need be.",
        )


def _weight(checkpoint: Checkpoint, name: str, lora: _Lora) -> torch.Tensor:
    weight = checkpoint.weight(name)
    if weight is None or tuple(weight.shape) != (len(lora.up), lora.down.shape[1]):
        there = "has none" if weight is None else f"has one of {tuple(weight.shape)}"
        raise ModelError(
            f"The adapter changes a {name} of {(len(lora.up), lora.down.shape[1])}; the model"
            f" {there}.",
            "Give the model that the adapter was trained on.",
        )
    return weight
