"""``continue``: vLLM's own KV-cache manager never finds what was cut off."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from patcher.engine import vllm_core

BLOCK = 16
PROMPT = list(range(100, 100 + 5 * BLOCK))

# Importing vLLM here warns; that isn't ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def manager() -> Any:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    config = KVCacheConfig(
        num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    return KVCacheManager(
        config, max_model_len=1024, scheduler_block_size=BLOCK, hash_block_size=BLOCK
    )


def request(name: str, tokens: list[int]) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(name, tokens, SamplingParams(max_tokens=999), None, block_hasher=hasher)


def compute(kv: Any, one: Any, tokens: int) -> int:
    """Compute ``tokens`` of a request as the scheduler does; how many of them were found."""
    blocks, found, _ = kv.get_computed_blocks(one)
    assert kv.allocate_slots(one, tokens - found, found, blocks) is not None
    one.num_computed_tokens = tokens
    return int(found)


def more(kv: Any, one: Any, tokens: list[int]) -> None:
    for token in tokens:
        one.append_output_token_ids(token)
        assert kv.allocate_slots(one, 1) is not None
        one.num_computed_tokens += 1


def core(kv: Any, *requests: Any, **other: Any) -> Any:
    held = {r.request_id: r for r in requests}
    scheduler = {"connector": None, "ec_connector": None, "running": list(requests)}
    return SimpleNamespace(
        scheduler=SimpleNamespace(requests=held, kv_cache_manager=kv, **{**scheduler, **other})
    )


def found(kv: Any, tokens: list[int]) -> int:
    """How much of a new request's KV the cache would give it."""
    return int(kv.get_computed_blocks(request("new", [*tokens, 7]))[1])


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:5]], ids=["blocks", "no-full-block"])
def test_nothing_of_a_request_that_went_on_is_found(prompt: list[int]) -> None:
    kv, said = manager(), list(range(500, 500 + 3 * BLOCK))
    running, waiting = request("running", prompt), request("waiting", prompt)
    compute(kv, running, len(prompt))
    reply = vllm_core.patcher_keep_requests(core(kv, running, waiting))
    assert reply == {"ok": True, "requests": ["running"]}
    more(kv, running, said)  # blocks fill up over the old context
    assert found(kv, prompt) == 0
    # Another request puts the same prefix in the cache, computed anew: only that is found.
    assert compute(kv, waiting, len(prompt)) == 0
    assert found(kv, prompt) == len(prompt) // BLOCK * BLOCK
    assert found(kv, prompt + said) == len(prompt) // BLOCK * BLOCK
    # Preempted, it finds neither its own blocks nor those.
    kv.free(running)
    running.num_computed_tokens = 0
    assert compute(kv, running, running.num_tokens) == 0


def test_the_prefix_cache_is_found_without_it() -> None:
    """The test above can fail."""
    kv, said = manager(), list(range(500, 500 + 3 * BLOCK))
    running = request("running", PROMPT)
    compute(kv, running, len(PROMPT))
    more(kv, running, said)
    assert found(kv, PROMPT + said) == len(PROMPT + said)


def test_a_prompt_that_was_computed_half_is_not_found_when_it_is_whole() -> None:
    kv, running = manager(), request("running", PROMPT)
    compute(kv, running, 2 * BLOCK)
    assert vllm_core.patcher_keep_requests(core(kv, running))["ok"]
    assert kv.allocate_slots(running, 3 * BLOCK) is not None
    running.num_computed_tokens = len(PROMPT)
    assert found(kv, PROMPT) == 0


@pytest.mark.parametrize("held", ["connector", "ec_connector", "image"])
def test_what_could_be_found_elsewhere_is_refused(held: str) -> None:
    kv, running = manager(), request("running", PROMPT)
    compute(kv, running, len(PROMPT))
    other = {} if held == "image" else {held: object()}
    if held == "image":
        running.mm_features = [object()]
    reply = vllm_core.patcher_keep_requests(core(kv, running, **other))
    assert not reply["ok"]
    assert "recompute" in reply["cure"]
    assert found(kv, PROMPT) == len(PROMPT), "nothing was touched"


def test_who_is_behind_is_counted_until_it_made_its_tokens_or_ended() -> None:
    kv = manager()
    a, b = request("a", PROMPT), request("b", PROMPT)
    engine = core(kv, a, b)
    assert vllm_core.patcher_behind(engine, 4)["requests"] == 0
    assert vllm_core.patcher_note_running(engine)["requests"] == 2
    a.append_output_token_ids([1, 2, 3, 4])
    assert vllm_core.patcher_behind(engine, 4)["requests"] == 1
    del engine.scheduler.requests["b"]
    assert vllm_core.patcher_behind(engine, 4)["requests"] == 0


def test_a_fault_is_an_answer() -> None:
    reply = vllm_core.patcher_keep_requests(SimpleNamespace())
    assert not reply["ok"]
    assert "AttributeError" in reply["detail"]
