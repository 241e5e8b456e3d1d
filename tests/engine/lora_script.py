"""An adapter and a patch at the same time: ``MODEL MERGED PATCH ADAPTER``."""

from __future__ import annotations

import gc
import sys
from typing import Any

import patcher
from tests.engine.llms import answers, start
from tests.engine.scripts import say


def main(model: str, merged: str, patch: str, adapter: str) -> None:
    from vllm.lora.request import LoRARequest

    found: dict[str, Any] = {}
    options = {"enable_lora": True, "max_lora_rank": 8}
    lora, later = LoRARequest("an-adapter", 1, adapter), LoRARequest("the-same", 2, adapter)

    llm = start(model, **options)
    found["base"], found["base with adapter"] = answers(llm), answers(llm, lora_request=lora)
    with patcher.attach(llm) as engine:
        engine.apply(patch)
        # Loaded before the patch, and after it.
        found["patched with adapter"] = answers(llm, lora_request=lora)
        found["patched with later adapter"] = answers(llm, lora_request=later)
        found["patched"] = answers(llm)
        found["verified"] = engine.verify()
    found["reverted"] = answers(llm)
    found["reverted with adapter"] = answers(llm, lora_request=lora)
    del llm
    gc.collect()

    llm = start(merged, **options)
    found["merged"], found["merged with adapter"] = answers(llm), answers(llm, lora_request=lora)
    say(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
