"""vLLM's internals on the API server's side, read in vLLM 0.32.0.

Calling every rank of every engine, pausing, flushing and the weight version
(``v1/engine/async_llm.py``, ``v1/engine/core_client.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from patcher.errors import EngineRefusedError
from patcher.protocol import InFlight

# What vLLM's pause does with running requests, by our policy's name.
_PAUSE_MODE: dict[InFlight, str] = {"recompute": "keep", "drain": "wait", "abort": "abort"}


async def call_workers(client: Any, method: str, *args: Any) -> list[dict[str, Any]]:
    """Call ``method`` on every rank of every engine and return all replies.

    A data-parallel client's own ``collective_rpc`` returns one engine's replies only. Each
    reply gets the number of its ``engine``: ranks are counted within one.
    """
    core = getattr(client, "engine_core", None)
    call_all = getattr(core, "call_utility_all_async", None)
    if call_all is None:
        per_engine = [await client.collective_rpc(method, args=args)]
    else:
        per_engine = await call_all("collective_rpc", method, None, args, None)
    return [{**reply, "engine": i} for i, replies in enumerate(per_engine) for reply in replies]


@dataclass
class Pause:
    """A stop of the engine. ``hold``: don't let it go on at the end."""

    hold: bool = False


@asynccontextmanager
async def paused(
    client: Any, in_flight: InFlight, deadline: float | None = None, *, ours: bool = False
) -> AsyncIterator[Pause]:
    """Stop the engine between two steps; resume it unless somebody else had stopped it.

    ``deadline`` bounds, in seconds, how long ``drain`` waits. ``ours``: a stop that is found
    is one that an earlier failure of ours held.

    Raises :class:`TimeoutError` at the deadline, with the engine running again.
    """
    found = await client.is_paused() and not ours
    pause = Pause()
    try:
        try:
            async with asyncio.timeout(deadline if in_flight == "drain" else None):
                await client.pause_generation(mode=_PAUSE_MODE[in_flight], clear_cache=False)
        except TimeoutError:
            # Data-parallel engines don't resume from a pause that still waits: end the wait.
            await client.pause_generation(mode="keep", clear_cache=False)
            raise
        yield pause
    finally:
        if not found and not pause.hold:
            await client.resume_generation()


async def flush(client: Any) -> None:
    """Drop all that was computed with the old weights; running requests are recomputed.

    Raises :class:`EngineRefusedError` where vLLM reports that something stayed.
    """
    done = await client.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    if not done:
        raise EngineRefusedError(
            "vLLM could not drop its prefix cache: blocks are still held.",
            "Try again when fewer requests run, or with --in-flight drain.",
        )
    await client.reset_mm_cache()
    await client.reset_encoder_cache()


async def get_weight_version(client: Any) -> str | None:
    """The weight version that the engine stamps its outputs with; None where it has none."""
    get = getattr(client, "get_weight_version", None)
    return None if get is None else str(await get())


async def set_weight_version(client: Any, version: str) -> None:
    """Tell the engine its weight version, where vLLM knows the notion."""
    update = getattr(client, "update_weight_version", None)
    if update is not None:
        await update(version)


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
