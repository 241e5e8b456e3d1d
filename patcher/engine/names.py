"""Which module of the served model a patch's name means.

A patch names modules as the checkpoint does. vLLM may serve them under other names; its own
model classes say which (``hf_to_vllm_mapper``, ``get_language_model``), read in vLLM 0.32.0
(``model_executor/models/utils.py``, ``model_executor/models/interfaces.py``). A wrong guess
can do no harm: the digests in the patch are of one weight only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from patcher.errors import EngineRefusedError


def find_module(model: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """The module that the checkpoint calls ``name``; None where this rank has none.

    Tried in this order: the name that vLLM loads the checkpoint's weight under, the name as
    it is, and in a multimodal model the same for the language model in it, so that patches
    computed on a text-only checkpoint of it fit too.
    """
    for candidate in (_as_loaded(model, name), name):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            pass
    inner = _language_model(model)
    return None if inner is None else find_module(inner, name)


def refuse_experts(model: torch.nn.Module, name: str) -> None:
    """Raise :class:`EngineRefusedError` where ``name`` is of a mixture's experts.

    vLLM fuses them into one tensor, which its CPU backend packs in a way that can't be read back.
    """
    mixture, found, _ = f"{name}.".partition(".experts.")
    if found and find_module(model, f"{mixture}.experts") is not None:
        raise EngineRefusedError(
            f"Module {name} is of a mixture of experts, whose fused weights can't be folded yet.",
            "Patch layers of this model that are not mixtures, if it has any.",
        )


def refuse_one_layer_twice(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Raise :class:`EngineRefusedError` where two of the names mean the same layer.

    Models share a layer between two places, or know it by two names. A patch of it under one
    name acts wherever it serves; under two, the last one written would win.
    """
    seen: dict[int, str] = {}
    for name in sorted(names):
        module = find_module(model, name)
        if module is None or type(module).__name__ == "PPMissingLayer":
            continue
        other = seen.setdefault(id(module), name)
        if other != name:
            raise EngineRefusedError(
                f"Modules {other} and {name} are one and the same layer in the served model.",
                "Compute the patches for one of the names only.",
            )


def _as_loaded(model: Any, name: str) -> str:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    loaded = None if mapper is None else mapper.map_name(f"{name}.weight")
    return name if loaded is None else str(loaded).removesuffix(".weight")


def _language_model(model: Any) -> torch.nn.Module | None:
    try:
        inner = model.get_language_model()
    except (AttributeError, NotImplementedError):
        return None
    return inner if isinstance(inner, torch.nn.Module) and inner is not model else None
