"""Changes that come faster than contexts can be recomputed are spaced.

A change under ``recompute`` makes every running request compute its context again. The next
such change waits until each of those requests has ended or made :data:`TOKENS` tokens since, and
at most as long as the setting says; so however fast changes come, every stream goes on. Who
waits holds the lock of changes, so it holds for all API servers; how far the requests are, their
scheduler knows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from patcher.engine import vllm_client
from patcher.engine.settings import DEFAULT_LONGEST
from patcher.protocol import InFlight

TOKENS = 16  # that a recomputed request makes before it is recomputed again
_ASK_EVERY = 0.05  # seconds
logger = logging.getLogger("vllm.patcher")


class Spacing:
    """The waiting between changes. ``longest``: seconds at most; 0 turns it off."""

    def __init__(self, client: Any, longest: float = DEFAULT_LONGEST) -> None:
        self._client = client
        self._longest = longest

    async def wait(self, in_flight: InFlight) -> float:
        """Wait for the requests that the last change had recomputed; the seconds that it took."""
        began = time.monotonic()
        if in_flight != "recompute":
            return 0.0  # recomputes nothing
        while (waited := time.monotonic() - began) < self._longest:
            if not await self._behind():
                break
            await asyncio.sleep(_ASK_EVERY)
        return waited

    async def note(self, in_flight: InFlight) -> None:
        """Remember, in the pause, the requests that the change is about to recompute."""
        if in_flight == "recompute" and self._longest > 0:
            await self._ask("patcher_note_running")

    async def _behind(self) -> int:
        return await self._ask("patcher_behind", TOKENS)

    async def _ask(self, method: str, *args: Any) -> int:
        """How many requests, in all engines; without an answer none: spacing is a courtesy."""
        try:
            replies = await vllm_client.call_cores(self._client, method, *args)
            return sum(reply["requests"] for reply in replies)
        except Exception as error:
            logger.warning("patcher: changes can't be spaced: %s", error)
            return 0
