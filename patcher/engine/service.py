"""One change of the stack, from intent to outcome, over every rank of every engine.

check what serves → stage (beside the live weights, while the engine serves) → pause → commit →
flush → weight version → resume → read back → outcome on disk. Whatever fails on the way, the
stack before is put back, and the engine goes on only when that is done.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from patcher.engine import vllm_adapter
from patcher.engine.stack import Stack, admit
from patcher.engine.store import Store
from patcher.errors import (
    BaseMismatchError,
    EngineRefusedError,
    PatcherError,
    StackChangedError,
    VerificationError,
    by_code,
)
from patcher.patch import Manifest, Patch
from patcher.protocol import InFlight

DRAIN_DEADLINE = 120.0  # seconds that `drain` waits for running requests
logger = logging.getLogger("vllm.patcher")


@dataclass(frozen=True)
class Outcome:
    """What a change led to. ``seconds`` is all of it, ``pause_ms`` the engine's stop."""

    stack: Stack
    seconds: float
    pause_ms: float

    def as_dict(self) -> dict[str, Any]:
        """The wire form."""
        return {
            "stack": list(self.stack.ids),
            "weight_version": self.stack.version,
            "seconds": round(self.seconds, 4),
            "pause_ms": round(self.pause_ms, 2),
        }


class PatchService:
    """The API-server process's hand on the engine. The truth stays in workers and store."""

    def __init__(self, client: Any, store: Store) -> None:
        self.client = client
        self.store = store
        self._turn = asyncio.Lock()

    # -- looking -----------------------------------------------------------------------------

    async def call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Call every rank; raise what the first refusing rank reported."""
        nonce = secrets.token_hex(8)
        replies = await vllm_adapter.call_workers(self.client, method, nonce, *args)
        if any(reply.get("nonce") != nonce for reply in replies):
            raise EngineRefusedError(
                "The engine's replies are out of step.", "Restart the engine; its state is safe."
            )
        for reply in replies:
            if not reply["ok"]:
                kind = by_code(reply["error"])
                kind = EngineRefusedError if kind is PatcherError else kind
                raise kind(f"Rank {reply['rank']}: {reply['detail']}", reply["cure"])
        return replies

    async def probe(self) -> list[dict[str, Any]]:
        """What each rank runs and holds.

        Raises :class:`EngineRefusedError` where a process lacks the plugin, or doesn't answer.
        """
        try:
            return await self.call("patcher_probe")
        except PatcherError:
            raise
        except Exception as error:
            if "patcher_probe" not in str(error):
                raise _refusal("The engine doesn't answer", error) from error
            raise EngineRefusedError(
                "The engine's workers don't have the plugin.",
                "Name `patcher` in VLLM_PLUGINS for every process of the engine.",
            ) from error

    async def status(self) -> dict[str, Any]:
        """What is in force, as the workers tell it."""
        ranks = await self.probe()
        stack = self.store.in_force()
        manifests = await asyncio.to_thread(self.store.manifests)
        modules = stack.modules(manifests)
        version = await vllm_adapter.get_weight_version(self.client)
        settled = all(tuple(rank["stack"]) == stack.ids for rank in ranks)
        settled = settled and version in (None, stack.version) and not self.store.unclean
        return {
            "engine": {
                **vllm_adapter.describe(self.client),
                "patcher": ranks[0]["version"],
                "weight_version": version,
                "state": "ready" if settled else "changing",
            },
            "base": {n: manifests[ids[0]].base.modules[n].digest for n, ids in modules.items()},
            "stack": list(stack.ids),
            "weight_version": stack.version,
            "patches": self._patches_in_force(manifests),
            "modules": {name: list(ids) for name, ids in modules.items()},
            "processes": [
                {"rank": r["rank"], "pid": r["pid"], "plugin": r["version"]} for r in ranks
            ],
        }

    def _patches_in_force(self, manifests: dict[str, Manifest]) -> list[dict[str, Any]]:
        if self.store.suspended:
            return []
        return [
            {
                "id": patch_id,
                "title": manifests[patch_id].title,
                "since": since,
                "modules": self.store.ranks(patch_id),
            }
            for patch_id, since in self.store.since()
        ]

    async def verify(self) -> dict[str, Any]:
        """Compare the live weights on every rank with what (base, stack) must give.

        Reads every module that a patch of this engine ever changed, one between two steps:
        patched ones against the fold of the stack, the others against their base.
        """
        async with self._exclusive():
            stack = self.store.in_force()
            told = {r["rank"]: r["stack"] for r in await self.probe()}
            by_rank: dict[int, dict[str, Any]] = {rank: {} for rank in told}
            for name, module in await asyncio.to_thread(self.store.known_modules):
                for reply in await self.call("patcher_verify", name, module):
                    if reply["verdict"] is not None:
                        by_rank[reply["rank"]][name] = reply["verdict"]
        modules: dict[str, bool] = {}
        for verdicts in by_rank.values():
            for name, verdict in verdicts.items():
                modules[name] = modules.get(name, True) and bool(verdict["ok"])
        agree = all(tuple(ids) == stack.ids for ids in told.values())
        return {
            "ok": agree and all(modules.values()),
            "modules": dict(sorted(modules.items())),
            "weight_version": stack.version,
            "ranks": [
                {"rank": rank, "stack": told[rank], "modules": by_rank[rank]} for rank in told
            ],
        }

    # -- changing ----------------------------------------------------------------------------

    async def restore(self) -> None:
        """Bring the engine to the stack that must be in force, before it serves."""
        async with self._exclusive():
            await self._reconcile("start")
            stack = self.store.in_force()
            await vllm_adapter.set_weight_version(self.client, stack.version)

    async def change(
        self, ids: list[str], *, if_match: str, in_flight: InFlight, actor: str, reason: str = ""
    ) -> Outcome:
        """Make ``ids`` the stack in force, on every rank or on none.

        Raises :class:`StackChangedError` where ``if_match`` isn't the weight version in force,
        :class:`VerificationError` where something else changed the live weights, what
        :func:`admit` raises, and what a rank refused with.
        """
        began = time.monotonic()
        async with self._exclusive():
            await self._reconcile("repair")
            before = self.store.in_force()
            target = admit(ids, await asyncio.to_thread(self.store.manifests))
            if target == before and not self.store.suspended:
                # A retry of a change whose answer got lost.
                return Outcome(before, time.monotonic() - began, 0.0)
            if if_match != before.version:
                raise StackChangedError(
                    f"The weight version in force is {before.version[:16]}, not {if_match[:16]}.",
                    "Somebody changed the stack; look at `patcher status` and try again.",
                )
            detail: dict[str, Any] = {
                "change": secrets.token_hex(8),
                "actor": actor,
                "reason": reason,
                "before": list(before.ids),
                "after": list(target.ids),
            }
            await self._record("change-intent", {**detail, "in_flight": in_flight})
            try:

                def done(digests: dict[str, list[str]]) -> None:
                    self.store.commit(target, "change-done", {**detail, "digests": digests})

                pause_ms = await self._transition([before], target, before, in_flight, done)
            except BaseException as error:
                cause = error.code if isinstance(error, PatcherError) else type(error).__name__
                await self._record_if_possible("change-failed", {**detail, "cause": cause})
                raise
        return Outcome(target, time.monotonic() - began, pause_ms)

    async def _transition(
        self,
        served: list[Stack],
        target: Stack,
        fallback: Stack,
        in_flight: InFlight,
        record: Callable[[dict[str, list[str]]], object],
    ) -> float:
        """Change live weights and record the outcome; returns the pause in ms.

        ``served`` are the stacks that ranks serve now; ``fallback`` is the one in force where
        this fails. ``record`` gets each module's digests by rank.
        """
        change_id = secrets.token_hex(8)
        try:
            await self._check_live(fallback)
            digests = await self._stage(change_id, served, target)
        except BaseException as error:
            await self._discard(change_id)  # nothing live was touched
            raise _refusal("The engine failed while staging", error) from error
        pause_ms = await self._swap(change_id, target, fallback, in_flight)
        try:
            await self._read_back(digests)
            by_rank = {name: [d[rank] for rank in sorted(d)] for name, d in digests.items()}
            await asyncio.to_thread(record, by_rank)
        except BaseException as error:
            async with vllm_adapter.paused(self.client, "recompute") as pause:
                await self._put_back(change_id, fallback, pause)
            raise _refusal("The new stack could not be confirmed", error) from error
        await self._discard(change_id)
        return pause_ms

    async def _check_live(self, stack: Stack) -> None:
        """Every module in force must still be what was put there."""
        for name in sorted(stack.modules(await asyncio.to_thread(self.store.manifests))):
            if not all(r["ok_live"] for r in await self.call("patcher_check", name)):
                raise VerificationError(
                    f"Something else changed the live weight of {name}.",
                    "A weight reload or a sleep does that; restart the engine.",
                )

    async def _stage(
        self, change_id: str, served: list[Stack], target: Stack
    ) -> dict[str, dict[int, str]]:
        """Prepare every module that changes; returns its digests by rank."""
        ranks = await self.probe()
        for patch_id in target.ids:
            if any(patch_id not in rank["held"] for rank in ranks):
                data = await asyncio.to_thread(self.store.patch_bytes, patch_id)
                await self.call("patcher_receive", data)
        await self.call("patcher_begin", change_id, list(target.ids))
        digests: dict[str, dict[int, str]] = {}
        manifests = await asyncio.to_thread(self.store.manifests)
        for name in sorted({n for s in served for n in s.changed_modules(target, manifests)}):
            replies = [r for r in await self.call("patcher_stage", change_id, name) if r["holds"]]
            if not replies:
                raise BaseMismatchError(
                    f"The served model has no module {name}.",
                    "The patch was computed for another architecture.",
                )
            digests[name] = {r["rank"]: r["digest"] for r in replies}
        return digests

    async def _swap(
        self, change_id: str, target: Stack, fallback: Stack, in_flight: InFlight
    ) -> float:
        """Stop the engine, exchange the weights, drop what was cached; all or nothing."""
        stopped = time.monotonic()
        try:
            async with vllm_adapter.paused(self.client, in_flight, DRAIN_DEADLINE) as pause:
                try:
                    await self.call("patcher_commit", change_id)
                    await vllm_adapter.flush(self.client)
                    await vllm_adapter.set_weight_version(self.client, target.version)
                except BaseException:
                    await self._put_back(change_id, fallback, pause)
                    raise
        except TimeoutError:
            await self._discard(change_id)
            raise EngineRefusedError(
                f"Running requests did not end within {DRAIN_DEADLINE:.0f} s.",
                "Use --in-flight recompute, which does not wait for them.",
            ) from None
        except BaseException as error:
            raise _refusal("The engine failed in the change", error) from error
        return (time.monotonic() - stopped) * 1000

    async def _read_back(self, digests: dict[str, dict[int, str]]) -> None:
        for name, expected in digests.items():
            found = {r["rank"]: r["digest"] for r in await self.call("patcher_check", name)}
            if any(found[rank] != digest for rank, digest in expected.items()):
                raise EngineRefusedError(f"The weight of {name} reads back differently.")

    async def _put_back(self, change_id: str, stack: Stack, pause: vllm_adapter.Pause) -> None:
        """Roll every rank back while the engine stands still; it goes on only if that worked."""
        pause.hold = True
        await asyncio.to_thread(self.store.set_unclean, True)
        await self.call("patcher_roll_back", change_id)
        await vllm_adapter.flush(self.client)
        await vllm_adapter.set_weight_version(self.client, stack.version)
        await asyncio.to_thread(self.store.set_unclean, False)
        pause.hold = False

    async def _discard(self, change_id: str) -> None:
        """Let go of what a change no longer needs; it is over, so trouble here is only noted."""
        try:
            await self.call("patcher_finish", change_id)
        except Exception:
            logger.exception("patcher: a rank kept what a change left")

    async def _reconcile(self, occasion: str) -> None:
        """Bring workers that serve another stack than the recorded one back to it."""
        await self._record_interruption()
        ranks = await self.probe()
        stack = self.store.in_force()
        left_over = {r["change"] for r in ranks if r["change"]}
        if self.store.unclean or not _agree(ranks, stack):
            for change_id in left_over or {""}:
                async with vllm_adapter.paused(
                    self.client, "recompute", ours=self.store.unclean
                ) as pause:
                    await self._put_back(change_id, stack, pause)
            ranks = await self.probe()
        else:
            for change_id in left_over:  # it succeeded, and only its end was lost
                await self._discard(change_id)
        if not _agree(ranks, stack):
            served = [Stack(tuple(r["stack"])) for r in ranks]

            def done(digests: dict[str, list[str]]) -> None:
                detail = {"stack": list(stack.ids), "digests": digests}
                self.store.record(f"{occasion}-restored", detail)

            await self._transition(served, stack, served[0], "recompute", done)

    async def _record_interruption(self) -> None:
        interrupted = await asyncio.to_thread(self.store.interrupted)
        if interrupted is not None:
            detail = {key: interrupted[key] for key in ("change", "before", "after")}
            await self._record("change-interrupted", detail)

    async def _record(self, event: str, detail: dict[str, Any]) -> None:
        await asyncio.to_thread(self.store.record, event, detail)

    async def _record_if_possible(self, event: str, detail: dict[str, Any]) -> None:
        try:
            await self._record(event, detail)
        except PatcherError:  # the error that is on its way says more
            logger.exception("patcher: %s could not be recorded", event)

    @asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        """One change at a time: in this process, and across the processes that share the store."""
        async with self._turn:
            lock = self.store.exclusive()
            await asyncio.to_thread(lock.__enter__)
            try:
                yield
            finally:
                lock.__exit__(None, None, None)

    def upload(self, data: bytes, actor: str) -> tuple[Patch, bool]:
        """Check a file's bytes and store them; the second value is False if it was there."""
        patch = Patch.from_bytes(data)
        return patch, self.store.add_patch(patch, actor)


def _agree(ranks: list[dict[str, Any]], stack: Stack) -> bool:
    return all(tuple(rank["stack"]) == stack.ids for rank in ranks)


def _refusal(what: str, error: BaseException) -> BaseException:
    """The error that a caller is to see: a typed one, or a refusal that names the cause."""
    if isinstance(error, PatcherError) or not isinstance(error, Exception):
        return error
    return EngineRefusedError(
        f"{what} ({type(error).__name__}: {error}).", "What was in force before still is."
    )
