"""A draft model beside the patched one, then a language model inside a multimodal one: ``FOLDER``.

The folder holds ``target``, ``merged``, ``draft``, ``patch.st``, and ``multimodal``,
``multimodal-merged``, and in ``names/`` the same patch under several module names.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

import patcher
from patcher.engine.names import find_module
from patcher.engine.vllm_worker import find_site
from patcher.kernels import digest
from tests.engine.llms import answers, error_of, start
from tests.engine.patches import module_name
from tests.engine.scripts import say

#: How a checkpoint may call the module that serves as ``language_model.model.layers.0…``.
NAMES = {
    "checkpoint": "language_model.model.layers",
    "transformers": "model.language_model.layers",
    "text-only": "model.layers",
}
#: Module of vLLM -> a multimodal class in it.
MULTIMODAL = {
    "gemma3_mm": "Gemma3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


def draft(folder: Path) -> dict[str, Any]:
    conf = {"method": "draft_model", "model": str(folder / "draft"), "num_speculative_tokens": 3}
    llm = start(folder / "target", speculative_config=conf)
    found: dict[str, Any] = {"base": answers(llm), "draft before": weight_of_draft(llm)}
    with patcher.attach(llm) as engine:
        engine.apply(folder / "patch.st")
        found["patched"] = answers(llm)
        found["draft after"] = weight_of_draft(llm)
        found["verified"] = engine.verify()
    found["reverted"] = answers(llm)
    del llm
    gc.collect()
    found["merged"] = answers(start(folder / "merged", speculative_config=conf))
    gc.collect()
    return found


def weight_of_draft(llm: Any) -> str:
    model = llm.llm_engine.model_executor.driver_worker.worker.get_draft_model()
    site = find_site(model, module_name(0))
    assert site is not None, "the draft has a module of that name too"
    return digest(site.read())


def multimodal(folder: Path) -> dict[str, Any]:
    only_text = {"limit_mm_per_prompt": {"image": 0}}
    llm = start(folder / "multimodal", **only_text)
    found: dict[str, Any] = {"base": answers(llm), "base again": answers(llm), "patched": {}}
    patches = sorted((folder / "names").iterdir())
    for path in patches:
        with patcher.attach(llm) as engine:
            engine.apply(path)
            found["patched"][path.stem] = [answers(llm), engine.verify()["ok"]]
    found["reverted"] = answers(llm)
    with patcher.attach(llm) as engine:
        found["two names"] = error_of(engine.apply, *patches[:2])
        found["after"] = [engine.status()["stack"], answers(llm)]
    del llm
    gc.collect()
    found["merged"] = answers(start(folder / "multimodal-merged", **only_text))
    return found


def served_names() -> dict[str, list[str]]:
    """What the mappers of vLLM's classes make of each spelling; no engine is started."""
    if importlib.util.find_spec("torchvision") is None:
        # These classes import it for their images, which nothing here looks at.
        for name in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional", ".io"):
            stand_in = MagicMock(__path__=[], __spec__=ModuleSpec(f"torchvision{name}", None))
            sys.modules[f"torchvision{name}"] = stand_in
    found = {}
    for module, name in MULTIMODAL.items():
        network = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
        wrapper = Wrapper(network.hf_to_vllm_mapper)
        served = wrapper.get_submodule("language_model.model.layers.0.mlp.down_proj")
        found[name] = [
            spelled
            for spelled, prefix in NAMES.items()
            if find_module(wrapper, f"{prefix}.0.mlp.down_proj") is served
        ]
    return found


class Wrapper(torch.nn.Module):
    """A multimodal model without weights."""

    def __init__(self, mapper: Any) -> None:
        super().__init__()
        self.hf_to_vllm_mapper = mapper
        self.language_model = nest("model.layers.0.mlp.down_proj")

    def get_language_model(self) -> torch.nn.Module:
        return self.language_model


def nest(path: str) -> torch.nn.Module:
    """Modules within each other, by the names of ``path``."""
    outer = torch.nn.Module()
    name, _, rest = path.partition(".")
    outer.add_module(name, nest(rest) if rest else torch.nn.Module())
    return outer


def main(folder: str) -> None:
    of = {"draft": draft(Path(folder)), "multimodal": multimodal(Path(folder))}
    say({**of, "names": served_names()})


if __name__ == "__main__":
    main(*sys.argv[1:])
