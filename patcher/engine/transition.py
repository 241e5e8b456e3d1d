"""How live weights get from one stack to another on all ranks, or stay where they are."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from patcher.engine import vllm_client
from patcher.engine.metrics import metrics
from patcher.engine.mixed import MixedRequests
from patcher.engine.observe import CHANGE
from patcher.engine.ranks import AT_ONCE, Place, Ranks, place, refusal
from patcher.engine.settings import DEFAULT_LONGEST
from patcher.engine.spacing import Spacing
from patcher.engine.spans import span
from patcher.engine.stack import Stack
from patcher.engine.stops import Stops, telling
from patcher.engine.store import Store
from patcher.errors import BaseMismatchError, EngineRefusedError, VerificationError
from patcher.protocol import InFlight

DRAIN_DEADLINE = 120.0  # seconds that `drain` waits for running requests
logger = logging.getLogger("vllm.patcher")


@dataclass(frozen=True)
class Swapped:
    """What a change cost: how long nothing ran and how long it waited to begin, in ms.

    ``mixed``: how many requests went on over KV of the weights before.
    """

    pause_ms: float = 0.0
    mixed: int = 0
    spaced_ms: float = 0.0


class Transition:
    """Stage beside the live weights, exchange them in a pause, read back; or put back."""

    def __init__(self, ranks: Ranks, store: Store, spacing: float = DEFAULT_LONGEST) -> None:
        self.ranks = ranks
        self.store = store
        self.spacing = Spacing(ranks.client, spacing)
        self.mixed = MixedRequests(store.folder)
        self.stops = Stops(ranks.client, store)
        self._ending: set[asyncio.Task[None]] = set()

    async def run(
        self,
        served: list[Stack],
        target: Stack,
        fallback: Stack,
        in_flight: InFlight,
        record: Callable[[dict[str, list[str]]], object],
        confirm: Callable[[], Awaitable[None]] | None = None,
        *,
        healing: bool = False,
    ) -> Swapped:
        """Change live weights and record the outcome.

        ``served`` are the stacks that ranks serve now; ``fallback`` is the one in force where
        this fails. ``record`` gets each module's digests by rank. ``confirm`` looks at the
        engine while it serves the new stack: what it raises takes the change back. Unless this
        is ``healing``, live weights are healed first.
        """
        change_id = secrets.token_hex(8)
        try:
            if not healing:
                await self.heal(fallback)
            with span("stage"):
                holding = [fallback] if healing else served
                digests = await self._stage(change_id, served, target, holding)
            with span("space"):
                spaced = await self.spacing.wait(in_flight)
        except BaseException as error:
            await self.discard(change_id)  # nothing live was touched
            raise refusal("The engine failed while staging", error) from error
        with span("pause", in_flight=in_flight):
            unread = dict(digests)
            pause_ms, mixed = await self._swap(change_id, target, fallback, in_flight, unread)
        try:
            with span("read_back", modules=len(unread)):
                await self._read_back(unread)
            if confirm is not None:
                with span("guards"):
                    await confirm()
            by_rank = {name: [d[at] for at in sorted(d)] for name, d in digests.items()}
            await _to_the_end(record, by_rank)
        except BaseException as error:
            with telling(error):
                async with self.stops.stopped("recompute") as pause:
                    await self.put_back(change_id, fallback, pause)
            raise refusal("The new stack could not be confirmed", error) from error
        self._discard_later(change_id)
        return Swapped(pause_ms, mixed, spaced * 1000)

    async def heal(self, stack: Stack, by: Mapping[str, str] | None = None) -> None:
        """Every module in force must be what was put there: it is put back where the base is.

        vLLM's ``reload_weights`` and a wake from a level-2 sleep bring base weights back.
        ``by``: who asked, for the ledger; else it was the change under way.

        Raises :class:`VerificationError` where a live weight is neither.
        """
        if not stack.ids:
            return
        drifted: dict[str, bool] = {}
        names = sorted(stack.modules(await asyncio.to_thread(self.store.manifests)))
        found = await self.ranks.each("patcher_check", [(name,) for name in names])
        for name, replies in zip(names, found, strict=True):
            if changed := [reply for reply in replies if not reply["ok_live"]]:
                drifted[name] = all(r["pristine"] for r in changed)
        if not drifted:
            return
        await self.note_drift(sorted(drifted))
        foreign = [name for name, pristine in drifted.items() if not pristine]
        if foreign:
            raise VerificationError(
                f"Something else changed the live weight of {foreign[0]}.",
                "Were other weights loaded? Restart the engine with the base of its patches.",
                modules=foreign,
            )

        def healed(digests: dict[str, list[str]]) -> None:
            told = {"modules": sorted(drifted), "stack": list(stack.ids), "digests": digests}
            self.store.record("drift-healed", {**told, **(by or {"change": CHANGE.get()})})

        logger.warning("patcher: the base was back in %d modules; healing", len(drifted))
        await self.run([Stack()], stack, stack, "recompute", healed, healing=True)
        await self.note_drift([])

    async def note_drift(self, modules: list[str]) -> None:
        """Tell which modules something else changed: in the state, the ledger and the metrics."""
        metrics().drifted(len(modules))
        await asyncio.to_thread(self.store.set_drift, modules)

    async def _stage(
        self, change_id: str, served: list[Stack], target: Stack, holding: list[Stack]
    ) -> dict[str, dict[Place, str]]:
        """Prepare every module that changes; returns its digests by rank.

        Ranks hold the patches of the stacks ``holding``, some of them these and some those.
        """
        reading = asyncio.create_task(asyncio.to_thread(self.store.manifests))
        try:  # a start reads them all, while the ranks read the files
            await self._begin(change_id, holding, target)
        finally:
            manifests = await reading
        digests: dict[str, dict[Place, str]] = {}
        for name in sorted({n for s in served for n in s.changed_modules(target, manifests)}):
            digests[name] = await self.stage_module(change_id, name)
        return digests

    async def _begin(self, change_id: str, holding: list[Stack], target: Stack) -> None:
        """Begin the change on every rank, with the patches that one of them lacks.

        The last of those comes with the call that begins, so that one patch costs no step more.
        """
        held = set.intersection(*(set(stack.ids) for stack in holding))
        lacking = [patch_id for patch_id in target.ids if patch_id not in held]
        for patch_id in lacking[:-1]:
            await self.ranks.call("patcher_receive", await self._bytes(patch_id))
        last = [("patcher_receive", await self._bytes(patch_id)) for patch_id in lacking[-1:]]
        await self.ranks.together(*last, ("patcher_begin", change_id, list(target.ids)))

    async def _bytes(self, patch_id: str) -> bytes:
        return await asyncio.to_thread(self.store.patch_bytes, patch_id)

    async def stage_module(self, change_id: str, name: str) -> dict[Place, str]:
        """Prepare one module on every rank that holds it, and read that back; digests by rank.

        In two calls: reading a pack takes a rank longest, and a step waits for one of them.

        Raises :class:`BaseMismatchError` where none does, and what a rank refuses with.
        """
        replies = await self.ranks.call("patcher_stage", change_id, name)
        digests = {place(r): r["digest"] for r in replies if r["holds"]}
        if not digests:
            raise BaseMismatchError(
                f"The served model has no module {name}.",
                "The patch was computed for another architecture.",
            )
        await self.ranks.call("patcher_check_staged", change_id, name)
        return digests

    async def _swap(
        self,
        change_id: str,
        target: Stack,
        fallback: Stack,
        in_flight: InFlight,
        unread: dict[str, dict[Place, str]],
    ) -> tuple[float, int]:
        """Stop the engine, exchange the weights, drop what was cached; all or nothing.

        Of ``unread``, what must be live by module, it reads back what takes a moment, and leaves
        the rest. Returns the pause in ms and how many requests go on over the KV that they have.
        """
        try:
            async with self.stops.stopped(in_flight, DRAIN_DEADLINE) as pause:
                mixed = await self._keep_requests(change_id, in_flight)
                try:
                    await self.ranks.call("patcher_commit", change_id)
                    await self._flush(in_flight)
                    await vllm_client.set_weight_version(self.ranks.client, target.version)
                    # Here it waits for no step: the first ones compute whole contexts.
                    await self._read_back(unread, within=AT_ONCE)
                except BaseException as error:
                    with telling(error):
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
        return (time.monotonic() - pause.asked) * 1000, mixed

    async def _keep_requests(self, change_id: str, in_flight: InFlight) -> int:
        """Under ``continue`` cut running requests off from the others, before anything changes."""
        if in_flight != "continue":
            return 0
        try:
            mixed = await vllm_client.keep_requests(self.ranks.client)
            await asyncio.to_thread(self.mixed.add, mixed)
        except BaseException:
            await self.discard(change_id)
            raise
        return len(mixed)

    async def _flush(self, in_flight: InFlight) -> None:
        if in_flight == "continue":  # its KV is unreachable already
            await vllm_client.flush_inputs(self.ranks.client)
            return
        await self.spacing.note(in_flight)
        await vllm_client.flush(self.ranks.client)

    async def _read_back(
        self, unread: dict[str, dict[Place, str]], within: float | None = None
    ) -> None:
        """Compare live weights with what must be; those that were read leave ``unread``."""
        names = [(name,) for name in unread]
        found = await self.ranks.each("patcher_check", names, within)
        for (name,), replies in zip(names, found, strict=False):
            live = {place(reply): reply["digest"] for reply in replies}
            if any(live[at] != digest for at, digest in unread.pop(name).items()):
                raise EngineRefusedError(f"The weight of {name} reads back differently.")

    async def put_back(self, change_id: str, stack: Stack, pause: vllm_client.Pause) -> None:
        """Roll every rank back while the engine stands still; it goes on only if that worked."""
        pause.hold = True
        await self.stops.mark(True)
        await self.ranks.call("patcher_roll_back", change_id)
        await vllm_client.flush(self.ranks.client)
        await vllm_client.set_weight_version(self.ranks.client, stack.version)
        await self.stops.mark(False)
        pause.hold = False

    async def discard(self, change_id: str) -> None:
        """Let go of what a change no longer needs; it is over, so trouble here is only noted."""
        try:
            await self.ranks.call("patcher_finish", change_id)
        except Exception:
            logger.exception("patcher: a rank kept what a change left")

    def _discard_later(self, change_id: str) -> None:
        """:meth:`discard` without a wait: the first steps after a flush compute whole contexts.

        Ranks take the calls of one process in order, so whatever that asks next finds it done;
        another process that finds it not done does it, and then this comes to nothing.
        """
        ending = asyncio.create_task(self.discard(change_id))
        self._ending.add(ending)  # a loop holds its tasks weakly
        ending.add_done_callback(self._ending.discard)

    async def settle(self) -> None:
        """Wait for what changes that are over have left to do."""
        await asyncio.gather(*self._ending)


async def _to_the_end(write: Callable[[Any], object], value: Any) -> None:
    """Write in a thread; a cancellation is too late by then: what is on disk must be in force."""
    writing = asyncio.ensure_future(asyncio.to_thread(write, value))
    while not writing.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([writing])
    writing.result()
