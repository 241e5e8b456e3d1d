"""vLLM's internals in the engine-core process, where requests are scheduled; read in vLLM 0.32.0.

The functions named ``patcher_*`` become methods of ``EngineCore`` (``v1/engine/core.py``) and
are called as its utilities, on every data-parallel engine. Like the workers' calls they take
plain values, never raise, and answer with a dict.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec

from patcher.errors import EngineRefusedError, PatcherError

P = ParamSpec("P")
Reply = dict[str, Any]
_CURE = "Use --in-flight recompute."


def _answers(call: Callable[Concatenate[Any, P], Mapping[str, Any]]) -> Callable[..., Reply]:
    @functools.wraps(call)
    def method(core: Any, *args: P.args, **kwargs: P.kwargs) -> Reply:
        try:
            return {"ok": True, **call(core, *args, **kwargs)}
        except PatcherError as error:
            return {"ok": False, "detail": error.message, "cure": error.cure}
        except Exception as error:
            return {"ok": False, "detail": f"{type(error).__name__}: {error}", "cure": ""}

    return method


@_answers
def patcher_keep_requests(core: Any) -> Reply:
    """Make all KV unreachable while the requests that hold some go on over theirs.

    Every block loses its hash, so nobody finds it. The block hashes of a request that holds KV
    become ones that no other request has, so that what it fills later isn't found either; and
    it reads nothing from the cache any more, so that it doesn't find its own after a
    preemption. The engine must be paused. Replies with the ``requests`` (ids) that go on.
    """
    scheduler = core.scheduler
    going_on = [r for r in scheduler.requests.values() if r.num_computed_tokens > 0]
    _check_keepable(scheduler, going_on)
    for request in going_on:
        secret = secrets.token_bytes(24)
        request.cache_salt = secret.hex()  # for a first block that isn't full yet
        hashes = request.block_hashes  # later ones are chained to the last of these
        hashes[:] = [secret + i.to_bytes(8, "big") for i in range(len(hashes))]
        request.skip_reading_prefix_cache = True
    manager = scheduler.kv_cache_manager
    manager.evict_blocks({b.block_id for b in manager.block_pool.blocks if b.block_hash})
    if len(manager.block_pool.cached_block_hash_to_block):
        raise EngineRefusedError("vLLM kept some prefix-cache entries.", _CURE)
    return {"requests": [r.request_id for r in going_on]}


def _check_keepable(scheduler: Any, going_on: list[Any]) -> None:
    """Raise where old KV, or what it was computed from, could be found in another way."""
    if scheduler.connector is not None:
        raise EngineRefusedError("A KV connector could hand out the KV of running requests.", _CURE)
    if scheduler.ec_connector is not None or any(r.mm_features for r in going_on):
        raise EngineRefusedError("Running requests hold cached encoder outputs.", _CURE)
    pool = scheduler.kv_cache_manager.block_pool
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    if any(manager.block_pool is not pool for manager in managers):
        raise EngineRefusedError("vLLM keeps KV in several pools here.", _CURE)


@_answers
def patcher_note_running(core: Any) -> Reply:
    """Remember how far each running request is, before all are recomputed."""
    core.patcher_noted = {r.request_id: r.num_tokens for r in core.scheduler.running}
    return {"requests": len(core.patcher_noted)}


@_answers
def patcher_behind(core: Any, tokens: int) -> Reply:
    """How many of the requests noted last still run and haven't made ``tokens`` tokens since."""
    noted: dict[str, int] = getattr(core, "patcher_noted", {})
    running = core.scheduler.requests
    noted = {i: n for i, n in noted.items() if i in running and running[i].num_tokens < n + tokens}
    core.patcher_noted = noted
    return {"requests": len(noted)}


@_answers
def patcher_sleeping(core: Any) -> Reply:
    """Whether the weights were moved out of the device's memory.

    vLLM's own ``is_sleeping`` is true of an engine that is merely paused, too, and of one whose KV
    alone is gone (``v1/executor/abstract.py``).
    """
    return {"sleeping": "weights" in getattr(core.model_executor, "sleeping_tags", ())}


METHODS: tuple[Callable[..., Reply], ...] = (
    patcher_keep_requests,
    patcher_note_running,
    patcher_behind,
    patcher_sleeping,
)


def install() -> None:
    """Make the calls methods of vLLM's engine core. Loading twice is harmless."""
    from vllm.v1.engine.core import EngineCore

    for method in METHODS:
        setattr(EngineCore, method.__name__, method)
