"""What was exported beside what it was exported from: ``MODEL ADAPTER MERGED PATCH…``.

One engine: the adapter on the base, then the patches, then the merged checkpoint's weights,
which the engine loads in place of its own.
"""

from __future__ import annotations

import sys
from typing import Any

import patcher
from tests.engine.llms import answers, start
from tests.engine.scripts import say


def main(model: str, adapter: str, merged: str, *patches: str) -> None:
    from vllm.lora.request import LoRARequest

    found: dict[str, Any] = {}
    lora = LoRARequest("exported", 1, adapter)
    llm = start(model, enable_lora=True, max_lora_rank=8, dtype="float32")
    found["base"], found["adapter"] = answers(llm), answers(llm, lora_request=lora)
    with patcher.attach(llm) as engine:
        engine.apply(*patches)
        found["patched"] = answers(llm)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": merged})
    llm.reset_prefix_cache()
    found["merged"] = answers(llm)
    say(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
