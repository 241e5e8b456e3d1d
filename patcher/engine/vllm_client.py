"""vLLM's internals on the API server's side, read in vLLM 0.32.0 and 0.31.0.

Calling every rank of every engine, pausing, flushing and the weight version
(``v1/engine/async_llm.py``, ``v1/engine/core_client.py``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from patcher.errors import EngineRefusedError
from patcher.protocol import InFlight

# Seconds; what vLLM gives a step before it gives up (``VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS``).
RPC_DEADLINE = 300.0
T = TypeVar("T")
# What vLLM's pause does with running requests, by our policy's name.
_PAUSE_MODE: dict[InFlight, str] = {
    "recompute": "keep",
    "drain": "wait",
    "abort": "abort",
    "continue": "keep",
}


async def call_workers(client: Any, method: str, *args: Any) -> list[dict[str, Any]]:
    """Call ``method`` on every rank of every engine and return all replies.

    A data-parallel client's own ``collective_rpc`` returns one engine's replies only. Each
    reply gets the number of its ``engine``: ranks are counted within one.

    Raises :class:`EngineRefusedError` where one doesn't answer in :data:`RPC_DEADLINE`.
    """
    call_all = _every_core(client)
    if call_all is None:
        per_engine = [await _answer(client.collective_rpc(method, args=args), "A rank", method)]
    else:
        asked = call_all("collective_rpc", method, None, args, None)
        per_engine = await _answer(asked, "A rank", method)
    return [{**reply, "engine": i} for i, replies in enumerate(per_engine) for reply in replies]


def _every_core(client: Any) -> Callable[..., Awaitable[list[Any]]] | None:
    """The call of a utility on every engine core that gives all answers; None: there is none."""
    core: Any = getattr(client, "engine_core", None)
    whole = getattr(core, "call_utility_all_async", None)
    one = getattr(core, "_call_utility_async", None)
    if whole is None and one is not None:  # vLLM 0.31

        async def whole(method: str, *args: Any) -> list[Any]:
            asked = [one(method, *args, engine=engine) for engine in core.core_engines]
            return await asyncio.gather(*asked)

    found: Callable[..., Awaitable[list[Any]]] | None = whole
    return found


async def _answer(asked: Awaitable[T], who: str, what: str) -> T:
    """What ``asked`` gives. Raises :class:`EngineRefusedError` after :data:`RPC_DEADLINE`."""
    try:
        async with asyncio.timeout(RPC_DEADLINE):
            return await asked
    except TimeoutError:
        raise EngineRefusedError(
            f"{who} did not answer {what} within {RPC_DEADLINE:.0f} s.",
            "Look at the log of its process, and restart the engine: the state is safe.",
        ) from None


async def call_cores(client: Any, method: str, *args: Any) -> list[dict[str, Any]]:
    """Call ``method`` of :mod:`patcher.engine.vllm_core` on every engine core.

    Raises :class:`EngineRefusedError` where one refuses, doesn't answer in :data:`RPC_DEADLINE`,
    or hasn't got the call.
    """
    call_all = _every_core(client)
    if call_all is None:
        raise EngineRefusedError("This engine's scheduler can't be reached.")
    replies: list[dict[str, Any]]
    replies = await _answer(call_all(method, *args), "An engine core", method)
    for reply in replies:
        if not reply["ok"]:
            raise EngineRefusedError(reply["detail"], reply["cure"])
    return replies


async def check_awake(client: Any) -> None:
    """See that the weights are where they belong.

    Raises :class:`EngineRefusedError` where an engine sleeps: its weights are moved out of the
    device's memory, which a rank may then not even read.
    """
    offline = getattr(client, "is_asleep", None)
    if offline is not None:
        asleep = await offline()
    else:
        asleep = any(r["sleeping"] for r in await call_cores(client, "patcher_sleeping"))
    if asleep:
        raise EngineRefusedError(
            "The engine sleeps: its weights are not where they serve from.",
            "Wake it (vLLM's `wake_up`), then try again.",
        )


def watch_requests(client: Any, seen: Callable[[Any], None]) -> None:
    """Have ``seen`` called with vLLM's state of each request, in the context that makes it.

    The state (``v1/engine/output_processor.py``, ``RequestState``) has ``request_id`` and
    ``weight_version_starts``: each version with the first output token that it made.
    """
    processor = getattr(client, "output_processor", None)
    if processor is None:
        return
    plain = processor.add_request

    def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
        plain(request, *args, **kwargs)
        state = processor.request_states.get(request.request_id)
        if hasattr(state, "weight_version_starts"):
            seen(state)

    processor.add_request = add_request


@dataclass
class Pause:
    """A stop of the engine.

    ``ours``: one that is found is what an earlier failure of ours left. ``hold``: don't let the
    engine go on at the end. ``standing``: that it stands still by this stop. ``asked``: since when.
    """

    ours: bool = False
    hold: bool = False
    standing: bool = False
    asked: float = field(default_factory=time.monotonic)


@asynccontextmanager
async def paused(
    client: Any, pause: Pause, in_flight: InFlight, deadline: float | None = None
) -> AsyncIterator[None]:
    """Stop the engine between two steps; resume it unless somebody else had stopped it.

    ``deadline`` bounds, in seconds, how long ``drain`` waits.

    Raises :class:`TimeoutError` at the deadline, with the engine running again.
    """
    pause.standing = pause.ours or not await is_paused(client)
    pause.asked = time.monotonic()
    try:
        try:
            async with asyncio.timeout(deadline if in_flight == "drain" else None):
                await _stop(client, _PAUSE_MODE[in_flight])
        except TimeoutError:
            # Data-parallel engines don't resume from a pause that still waits: end the wait.
            await _stop(client, "keep")
            raise
        yield
    finally:
        if pause.standing and not pause.hold:
            await _answer(client.resume_generation(), "The engine", "resume")
            pause.standing = False


async def is_paused(client: Any) -> bool:
    """Whether somebody stopped all engines: where only some stand still, nobody wanted that."""
    try:
        return bool(await _answer(client.is_paused(), "The engine", "is_paused"))
    except RuntimeError:  # vLLM's word for engines that differ
        return False


async def _stop(client: Any, mode: str) -> None:
    """vLLM's pause, without the 20 ms that ``AsyncLLM.pause_generation`` sleeps at its end.

    It sleeps for the last outputs to reach their readers before it returns. Nothing here needs
    that: what a token was made with is told where it is made.
    """
    core = getattr(client, "engine_core", None)
    stop = getattr(core, "pause_scheduler_async", None) or client.pause_generation
    stopping = stop(mode=mode, clear_cache=False)
    # A drain has its own deadline.
    await (stopping if mode == "wait" else _answer(stopping, "The engine", "pause"))


async def flush(client: Any) -> None:
    """Drop all that was computed with the old weights; running requests are recomputed.

    Raises :class:`EngineRefusedError` where vLLM reports that something stayed.
    """
    flushing = client.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    if not await _answer(flushing, "The engine", "reset_prefix_cache"):
        raise EngineRefusedError(
            "vLLM could not drop its prefix cache: blocks are still held.",
            "Try again when fewer requests run, or with --in-flight drain.",
        )
    await flush_inputs(client)


async def flush_inputs(client: Any) -> None:
    """Drop what was computed for images and the like, and by encoders."""
    await _answer(client.reset_mm_cache(), "The engine", "reset_mm_cache")
    await _answer(client.reset_encoder_cache(), "The engine", "reset_encoder_cache")


async def keep_requests(client: Any) -> list[str]:
    """Let running requests keep their KV and make all of it unreachable; the ids of those.

    Raises :class:`EngineRefusedError` where that can't be done; they then go on as before.
    """
    replies = await call_cores(client, "patcher_keep_requests")
    return [request for reply in replies for request in reply["requests"]]


async def get_weight_version(client: Any) -> str | None:
    """The weight version that the engine stamps its outputs with; None where it has none.

    Empty where engines differ, as in the midst of a change.
    """
    get = getattr(client, "get_weight_version", None)
    if get is None:
        return None
    try:
        return str(await _answer(get(), "The engine", "get_weight_version"))
    except RuntimeError:  # vLLM's word for engines that differ
        return ""


async def set_weight_version(client: Any, version: str) -> None:
    """Tell the engine its weight version, where vLLM knows the notion."""
    update = getattr(client, "update_weight_version", None)
    if update is not None:
        await _answer(update(version), "The engine", "update_weight_version")


def describe(client: Any) -> dict[str, Any]:
    """Model, vLLM's version and platform of the engine behind ``client``."""
    from vllm import __version__
    from vllm.platforms import current_platform

    config = client.vllm_config
    return {
        "vllm": __version__,
        "model": str(config.model_config.model),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "platform": str(current_platform.device_type),
        "world_size": int(config.parallel_config.world_size_across_dp),
        "eager": bool(config.model_config.enforce_eager),
    }
