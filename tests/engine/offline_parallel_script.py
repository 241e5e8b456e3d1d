"""A ``vllm.LLM`` over two ranks in processes of their own: ``MODEL PATCH``."""

from __future__ import annotations

import sys
import time
from typing import Any

import patcher
from tests.engine.llms import LONG, PROMPTS, TOKENS, answers, greedy, start
from tests.engine.scripts import say


def ended(llm: Any) -> list[list[Any]]:
    """Reason and tokens of each request that was enqueued."""
    outputs = [output.outputs[0] for output in llm.wait_for_completion(use_tqdm=False)]
    return [[output.finish_reason, list(output.token_ids)] for output in outputs]


def main(model: str, patch: str) -> None:
    found: dict[str, Any] = {}
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    llm = start(model, tensor_parallel_size=2, max_num_seqs=len(PROMPTS))
    found["base"] = answers(llm)
    with patcher.attach(llm) as engine:
        change = engine.apply(patch)
        found["patched"] = answers(llm)
        found["verified"] = engine.verify()
        engine.revert(*change["stack"])
        found["reverted"] = answers(llm)

        # The core steps by itself, while the script does something else.
        llm.enqueue(prompts, greedy(LONG), use_tqdm=False)
        time.sleep(0.1)
        engine.apply(patch)
        found["recomputed"] = ended(llm)
        found["patched after"] = answers(llm)
        # More than run at once: however long the disk takes for the record, some are left.
        llm.enqueue(prompts * 8, greedy(LONG), use_tqdm=False)
        engine.revert(all=True, in_flight="abort")
        found["aborted"] = ended(llm)
        llm.enqueue(prompts, greedy(TOKENS), use_tqdm=False)
        engine.apply(patch, in_flight="drain")
        found["drained"] = ended(llm)
    found["after with"] = answers(llm)
    say(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
