"""vLLM's internals behind an offline ``vllm.LLM``, read in vLLM 0.32.0.

``LLMEngine`` (``v1/engine/llm_engine.py``) is synchronous and can't be paused. Its core is
either another process that steps by itself, also between two calls of the script
(``SyncMPClient``), or lives in this one and steps when it is asked to (``InprocClient``;
both in ``v1/engine/core_client.py``). Here it gets the methods of vLLM's asynchronous engine
client that :mod:`patcher.engine.vllm_client` calls.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

from patcher.errors import EngineRefusedError


class OfflineClient:
    """An ``LLMEngine`` with the engine client's methods; each blocks until it is done."""

    engine_core = None  # one engine: `collective_rpc` below answers for all of its ranks

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)  # nothing of ours keeps an LLM alive
        self.vllm_config = engine.vllm_config

    @property
    def engine(self) -> Any:
        """The ``LLMEngine``. Raises :class:`EngineRefusedError` where it is gone."""
        engine = self._engine()
        if engine is None:
            raise EngineRefusedError("The LLM is gone.", "Attach to the one that is in use.")
        return engine

    @property
    def in_process(self) -> bool:
        """Whether the core lives in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``)."""
        return not hasattr(self.engine.engine_core, "call_utility")

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call ``method`` on every rank."""
        replies: list[Any] = self.engine.collective_rpc(method, args=args)
        return replies

    def _call(self, method: str, *args: Any) -> Any:
        # What LLMEngine has no method for, its core has.
        core = self.engine.engine_core
        return (
            getattr(core.engine_core, method)(*args)
            if self.in_process
            else core.call_utility(method, *args)
        )

    async def is_asleep(self) -> bool:
        """Whether the weights were moved out of the device's memory."""
        return bool(self._call("patcher_sleeping")["sleeping"])

    async def is_paused(self) -> bool:
        """Whether the scheduler stands still."""
        return bool(self._call("is_scheduler_paused"))

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        """Stop the scheduler.

        Raises :class:`EngineRefusedError` for ``wait`` where only the script could step the
        requests that it added: their outputs are its own.
        """
        if mode == "wait" and self.in_process:
            if self.engine.has_unfinished_requests():
                raise EngineRefusedError(
                    "Requests wait for this script to step them; drain can't.",
                    "Finish them first, or use in_flight='recompute'.",
                )
            mode = "keep"
        if mode == "abort" and self.in_process:
            # vLLM's in-process pause ends them in the scheduler only, and `generate` would wait.
            unfinished = list(self.engine.output_processor.request_states)
            self.engine.abort_request(unfinished, internal=True)
        if mode == "wait":  # in a thread, so that a deadline holds
            await asyncio.to_thread(self._call, "pause_scheduler", mode, clear_cache)
        else:
            self._call("pause_scheduler", mode, clear_cache)

    async def resume_generation(self) -> None:
        """Let the scheduler go on."""
        self._call("resume_scheduler")

    async def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Drop the prefix cache; running requests are computed anew."""
        return bool(self.engine.reset_prefix_cache(reset_running_requests, reset_connector))

    async def reset_mm_cache(self) -> None:
        """Drop what multimodal inputs were made into."""
        self.engine.reset_mm_cache()

    async def reset_encoder_cache(self) -> None:
        """Drop what encoders computed."""
        self.engine.reset_encoder_cache()

    async def update_weight_version(self, version: str) -> None:
        """Set what outputs are stamped with."""
        self.engine.set_weight_version(version)

    async def get_weight_version(self) -> str:
        """What outputs are stamped with."""
        return str(self.engine.get_weight_version())
