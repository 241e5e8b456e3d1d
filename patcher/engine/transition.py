"""How live weights get from one stack to another on all ranks, or stay where they are."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable

from patcher.engine import vllm_client
from patcher.engine.ranks import Place, Ranks, place, refusal
from patcher.engine.stack import Stack
from patcher.engine.store import Store
from patcher.errors import BaseMismatchError, EngineRefusedError, VerificationError
from patcher.protocol import InFlight

DRAIN_DEADLINE = 120.0  # seconds that `drain` waits for running requests
logger = logging.getLogger("vllm.patcher")


class Transition:
    """Stage beside the live weights, exchange them in a pause, read back; or put back."""

    def __init__(self, ranks: Ranks, store: Store) -> None:
        self.ranks = ranks
        self.store = store

    async def run(
        self,
        served: list[Stack],
        target: Stack,
        fallback: Stack,
        in_flight: InFlight,
        record: Callable[[dict[str, list[str]]], object],
        confirm: Callable[[], Awaitable[None]] | None = None,
    ) -> float:
        """Change live weights and record the outcome; returns the pause in ms.

        ``served`` are the stacks that ranks serve now; ``fallback`` is the one in force where
        this fails. ``record`` gets each module's digests by rank. ``confirm`` looks at the
        engine while it serves the new stack: what it raises takes the change back.
        """
        change_id = secrets.token_hex(8)
        try:
            await self._check_live(fallback)
            digests = await self._stage(change_id, served, target)
        except BaseException as error:
            await self.discard(change_id)  # nothing live was touched
            raise refusal("The engine failed while staging", error) from error
        pause_ms = await self._swap(change_id, target, fallback, in_flight)
        try:
            await self._read_back(digests)
            if confirm is not None:
                await confirm()
            by_rank = {name: [d[at] for at in sorted(d)] for name, d in digests.items()}
            await asyncio.to_thread(record, by_rank)
        except BaseException as error:
            async with vllm_client.paused(self.ranks.client, "recompute") as pause:
                await self.put_back(change_id, fallback, pause)
            raise refusal("The new stack could not be confirmed", error) from error
        await self.discard(change_id)
        return pause_ms

    async def _check_live(self, stack: Stack) -> None:
        """Every module in force must still be what was put there."""
        for name in sorted(stack.modules(await asyncio.to_thread(self.store.manifests))):
            if not all(r["ok_live"] for r in await self.ranks.call("patcher_check", name)):
                raise VerificationError(
                    f"Something else changed the live weight of {name}.",
                    "A weight reload or a sleep does that; restart the engine.",
                )

    async def _stage(
        self, change_id: str, served: list[Stack], target: Stack
    ) -> dict[str, dict[Place, str]]:
        """Prepare every module that changes; returns its digests by rank."""
        ranks = await self.ranks.probe()
        for patch_id in target.ids:
            if any(patch_id not in rank["held"] for rank in ranks):
                data = await asyncio.to_thread(self.store.patch_bytes, patch_id)
                await self.ranks.call("patcher_receive", data)
        await self.ranks.call("patcher_begin", change_id, list(target.ids))
        digests: dict[str, dict[Place, str]] = {}
        manifests = await asyncio.to_thread(self.store.manifests)
        for name in sorted({n for s in served for n in s.changed_modules(target, manifests)}):
            replies = [
                r for r in await self.ranks.call("patcher_stage", change_id, name) if r["holds"]
            ]
            if not replies:
                raise BaseMismatchError(
                    f"The served model has no module {name}.",
                    "The patch was computed for another architecture.",
                )
            digests[name] = {place(r): r["digest"] for r in replies}
        return digests

    async def _swap(
        self, change_id: str, target: Stack, fallback: Stack, in_flight: InFlight
    ) -> float:
        """Stop the engine, exchange the weights, drop what was cached; all or nothing."""
        stopped = time.monotonic()
        try:
            async with vllm_client.paused(self.ranks.client, in_flight, DRAIN_DEADLINE) as pause:
                try:
                    await self.ranks.call("patcher_commit", change_id)
                    await vllm_client.flush(self.ranks.client)
                    await vllm_client.set_weight_version(self.ranks.client, target.version)
                except BaseException:
                    await self.put_back(change_id, fallback, pause)
                    raise
        except TimeoutError:
            await self.discard(change_id)
            raise EngineRefusedError(
                f"Running requests did not end within {DRAIN_DEADLINE:.0f} s.",
                "Use --in-flight recompute, which does not wait for them.",
            ) from None
        except BaseException as error:
            raise refusal("The engine failed in the change", error) from error
        return (time.monotonic() - stopped) * 1000

    async def _read_back(self, digests: dict[str, dict[Place, str]]) -> None:
        for name, expected in digests.items():
            found = {place(r): r["digest"] for r in await self.ranks.call("patcher_check", name)}
            if any(found[at] != digest for at, digest in expected.items()):
                raise EngineRefusedError(f"The weight of {name} reads back differently.")

    async def put_back(self, change_id: str, stack: Stack, pause: vllm_client.Pause) -> None:
        """Roll every rank back while the engine stands still; it goes on only if that worked."""
        pause.hold = True
        await asyncio.to_thread(self.store.set_unclean, True)
        await self.ranks.call("patcher_roll_back", change_id)
        await vllm_client.flush(self.ranks.client)
        await vllm_client.set_weight_version(self.ranks.client, stack.version)
        await asyncio.to_thread(self.store.set_unclean, False)
        pause.hold = False

    async def discard(self, change_id: str) -> None:
        """Let go of what a change no longer needs; it is over, so trouble here is only noted."""
        try:
            await self.ranks.call("patcher_finish", change_id)
        except Exception:
            logger.exception("patcher: a rank kept what a change left")
