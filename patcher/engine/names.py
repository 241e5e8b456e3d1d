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


def find_experts_of(model: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """What runs the experts whose output projections are ``name``; None where that isn't of any.

    All experts of a layer are one weight, ``….experts.down_proj``, as transformers has it.

    Raises :class:`EngineRefusedError` where ``name`` means one expert alone.
    """
    mixture, found, member = f"{name}.".partition(".experts.")
    experts = find_module(model, f"{mixture}.experts") if found else None
    if experts is None or member == "down_proj.":
        return experts
    raise EngineRefusedError(
        f"Module {name} is one of a mixture's experts, which vLLM serves fused.",
        f"Patch all of them at once, as {mixture}.experts.down_proj.",
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
