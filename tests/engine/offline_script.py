"""A ``vllm.LLM`` in this very process, patched: ``MODEL MERGED PATCH OTHER STATE``."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import patcher
from patcher.engine.store import Store
from tests.engine.llms import PROMPTS, TOKENS, answers, error_of, greedy, start, told
from tests.engine.scripts import say


def by_hand(llm: Any, change: Any) -> list[Any]:
    """Two requests that are stepped by hand; ``change`` is made after their fourth token."""
    engine = llm.llm_engine
    for n, ids in enumerate(PROMPTS[:2]):
        engine.add_request(str(n), {"prompt_token_ids": ids}, greedy())
    last: dict[str, Any] = {}
    steps = 0
    while engine.has_unfinished_requests():
        steps += 1
        if steps == 5:
            change()
            continue
        for output in engine.step():
            last[output.request_id] = output.outputs[0]
    return [[told(last[key]), last[key].finish_reason] for key in sorted(last)]


def continued(llm: Any, begun: list[Any], kept: int) -> list[Any]:
    """What ``llm`` makes of the prompts and the first ``kept`` tokens of the answers to them."""
    prompts = [
        {"prompt_token_ids": [*ids, *answer[0][0][:kept]]}
        for ids, answer in zip(PROMPTS[:2], begun, strict=True)
    ]
    outputs = llm.generate(prompts, greedy(TOKENS - kept), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


async def in_a_notebook(llm: Any, state: str, patch: str) -> list[str]:
    return patcher.attach(llm, state=state).apply(patch)["stack"]


def main(model: str, merged: str, patch: str, other: str, state: str) -> None:
    found: dict[str, Any] = {}
    llm = start(model)
    found["base"], found["base again"] = answers(llm), answers(llm)
    with patcher.attach(llm) as engine:
        found["same object"] = patcher.attach(llm) is engine
        found["second state"] = error_of(patcher.attach, llm, state=state)
        found["change"] = engine.apply(patch, reason="a test")
        found["patched"] = answers(llm)
        found["status"] = engine.status()
        found["verified"] = engine.verify()
        found["version"] = llm.get_weight_version()
        found["again"] = error_of(engine.apply, patch)
        engine.revert(found["change"]["stack"][0][:12])
        found["reverted"] = answers(llm)
        guard = {"prompt": "p", "must_not_contain": "x"}
        found["guarded"] = error_of(engine.apply, patch, guards=guard)
        found["for an hour"] = error_of(engine.apply, patch, ttl="1h")
        found["refused"] = error_of(engine.apply, other)
        found["after refusal"] = [engine.status()["stack"], answers(llm)]
        found["ledger"] = [entry["event"] for entry in engine.ledger()]

        found["recomputed"] = by_hand(llm, lambda: engine.apply(patch))
        engine.revert(all=True)
        drain: list[Any] = []
        by_hand(llm, lambda: drain.append(error_of(engine.apply, patch, in_flight="drain")))
        found["drain"] = [drain[0], engine.status()["stack"]]
        found["aborted"] = by_hand(llm, lambda: engine.apply(patch, in_flight="abort"))
        engine.revert(all=True)
        engine.apply(patch, in_flight="drain")  # nothing runs: nothing to wait for
        found["patched again"] = answers(llm)
    found["after with"] = answers(llm)

    elsewhere = Store(Path(state))
    elsewhere.claim("another engine")
    found["shared folder"] = error_of(patcher.attach, llm, state=state)
    elsewhere.release()

    found["with a loop"] = asyncio.run(in_a_notebook(llm, state, patch))
    gone = weakref.ref(llm.llm_engine)
    del llm
    gc.collect()
    found["freed"] = gone() is None

    second = start(model)
    restored = patcher.attach(second, state=state)
    found["restored"] = [restored.status()["stack"], answers(second)]
    restored.close()
    found["closed"] = answers(second)
    del second
    gc.collect()
    found["no llm"] = error_of(patcher.attach, "an url")

    reference = start(merged)
    found["merged"] = answers(reference)
    found["continued"] = continued(reference, found["recomputed"], 4)
    say(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
