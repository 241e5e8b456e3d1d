"""One change of the stack, from intent to outcome, over every rank of every engine.

stage (beside the live weights, while the engine serves) → pause → commit → flush → weight
version → resume → outcome on disk. Whatever fails on the way, the stack before is put back.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from patcher.engine import vllm_adapter
from patcher.engine.stack import Stack, admit
from patcher.engine.store import Store
from patcher.engine.vllm_adapter import InFlight
from patcher.errors import (
    EngineRefusedError,
    PatcherError,
    StackChangedError,
    by_code,
)
from patcher.patch import Manifest, ModuleBase, Patch

DRAIN_DEADLINE = 120.0  # seconds that `drain` waits for running requests


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
                raise by_code(reply["error"])(
                    f"Rank {reply['rank']}: {reply['detail']}", reply["cure"]
                )
        return replies

    async def probe(self) -> list[dict[str, Any]]:
        """What each rank runs and holds.

        Raises :class:`EngineRefusedError` where a process lacks the plugin.
        """
        try:
            return await self.call("patcher_probe")
        except PatcherError:
            raise
        except Exception as error:
            raise EngineRefusedError(
                "The engine's workers don't have the plugin.",
                "Name `patcher` in VLLM_PLUGINS for every process of the engine.",
            ) from error

    async def status(self) -> dict[str, Any]:
        """What is in force, as the workers tell it."""
        ranks = await self.probe()
        stack = self.store.in_force()
        manifests = self.store.manifests()
        told = {tuple(rank["stack"]) for rank in ranks}
        modules = stack.modules(manifests)
        return {
            "engine": {
                **vllm_adapter.describe(self.client),
                "patcher": ranks[0]["version"],
                "state": "ready" if told == {stack.ids} else "changing",
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

        Every module that a stored patch names is read, patched or not.
        """
        async with self._exclusive():
            stack = self.store.in_force()
            ranks = await self.call("patcher_verify", _known_modules(self.store.manifests()))
        modules: dict[str, bool] = {}
        for rank in ranks:
            for name, verdict in rank["modules"].items():
                modules[name] = modules.get(name, True) and bool(verdict["ok"])
        agree = all(tuple(rank["stack"]) == stack.ids for rank in ranks)
        return {
            "ok": agree and all(modules.values()),
            "modules": dict(sorted(modules.items())),
            "weight_version": stack.version,
            "ranks": [
                {"rank": r["rank"], "stack": r["stack"], "modules": r["modules"]} for r in ranks
            ],
        }

    # -- changing ----------------------------------------------------------------------------

    async def restore(self) -> None:
        """Bring the engine to the stack that must be in force, before it serves."""
        async with self._exclusive():
            await self._reconcile("start")

    async def change(
        self, ids: list[str], *, if_match: str, in_flight: InFlight, actor: str, reason: str = ""
    ) -> Outcome:
        """Make ``ids`` the stack in force, on every rank or on none.

        Raises :class:`StackChangedError` where ``if_match`` isn't the weight version in force,
        what :func:`admit` raises, and what a rank refused with.
        """
        began = time.monotonic()
        async with self._exclusive():
            await self._reconcile("repair")
            before = self.store.in_force()
            target = admit(ids, self.store.manifests())
            if target == before:  # a retry of a change whose answer got lost
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
                pause_ms = await self._transition(before, target, in_flight, detail)
            except BaseException as error:
                cause = error.code if isinstance(error, PatcherError) else type(error).__name__
                await self._record("change-failed", {**detail, "cause": cause})
                raise
        return Outcome(target, time.monotonic() - began, pause_ms)

    async def _transition(
        self, before: Stack, target: Stack, in_flight: InFlight, detail: dict[str, Any]
    ) -> float:
        digests, pause_ms = await self._move([before], target, before, in_flight)
        done = {**detail, "digests": digests}
        try:
            await asyncio.to_thread(self.store.commit, target, "change-done", done)
        except Exception as error:
            await self._move([target], before, target, "recompute")
            raise EngineRefusedError(
                f"The new stack could not be made durable ({error}); the old one is in force.",
                "See to the state folder's disk.",
            ) from error
        return pause_ms

    async def _move(
        self, served: list[Stack], target: Stack, fallback: Stack, in_flight: InFlight
    ) -> tuple[dict[str, list[str]], float]:
        """Change live weights; returns each module's digests by rank, and the pause in ms.

        ``served`` are the stacks that ranks serve now; ``fallback`` is the one in force where
        this fails.
        """
        change_id = secrets.token_hex(8)
        try:
            digests = await self._stage(change_id, served, target)
            pause_ms = await self._commit(change_id, target, in_flight)
            await self.call("patcher_finish", change_id)
        except BaseException as error:
            await self._put_back(change_id, fallback)
            if isinstance(error, PatcherError) or not isinstance(error, Exception):
                raise
            raise EngineRefusedError(f"The engine failed in the change: {error}.") from error
        return digests, pause_ms

    async def _stage(
        self, change_id: str, served: list[Stack], target: Stack
    ) -> dict[str, list[str]]:
        ranks = await self.probe()
        for patch_id in target.ids:
            if any(patch_id not in rank["held"] for rank in ranks):
                await self.call("patcher_receive", self.store.patch_bytes(patch_id))
        await self.call("patcher_begin", change_id, list(target.ids))
        digests: dict[str, list[str]] = {}
        manifests = self.store.manifests()
        for name in sorted({n for s in served for n in s.changed_modules(target, manifests)}):
            replies = [r for r in await self.call("patcher_stage", change_id, name) if r["holds"]]
            if not replies:
                raise EngineRefusedError(
                    f"The served model has no module {name}.",
                    "The patch was computed for another architecture.",
                )
            digests[name] = [r["digest"] for r in replies]
        return digests

    async def _commit(self, change_id: str, target: Stack, in_flight: InFlight) -> float:
        stopped = time.monotonic()
        try:
            async with asyncio.timeout(DRAIN_DEADLINE) as deadline:
                async with vllm_adapter.paused(self.client, in_flight):
                    deadline.reschedule(None)
                    await self.call("patcher_commit", change_id)
                    await vllm_adapter.flush(self.client)
                    await vllm_adapter.set_weight_version(self.client, target.version)
        except TimeoutError:
            raise EngineRefusedError(
                f"Running requests did not end within {DRAIN_DEADLINE:.0f} s.",
                "Use --in-flight recompute, which does not wait for them.",
            ) from None
        return (time.monotonic() - stopped) * 1000

    async def _put_back(self, change_id: str, before: Stack) -> None:
        """Roll every rank back and drop what was cached meanwhile."""
        async with vllm_adapter.paused(self.client, "recompute"):
            await self.call("patcher_roll_back", change_id)
            await vllm_adapter.flush(self.client)
            await vllm_adapter.set_weight_version(self.client, before.version)

    async def _reconcile(self, occasion: str) -> None:
        """Bring workers that serve another stack than the recorded one back to it."""
        interrupted = self.store.interrupted()
        if interrupted is not None:
            detail = {k: interrupted["detail"][k] for k in ("change", "before", "after")}
            await self._record("change-interrupted", detail)
        ranks = await self.probe()
        stack = self.store.in_force()
        for left_over in {r["change"] for r in ranks if r["change"]}:
            await self._put_back(left_over, stack)
        told = {tuple(r["stack"]) for r in await self.probe()}
        if told == {stack.ids}:
            if occasion == "start":
                await vllm_adapter.set_weight_version(self.client, stack.version)
            return
        served = [Stack(ids) for ids in told]
        digests, _ = await self._move(served, stack, served[0], "recompute")
        await self._record(f"{occasion}-restored", {"stack": list(stack.ids), "digests": digests})

    async def _record(self, event: str, detail: dict[str, Any]) -> None:
        await asyncio.to_thread(self.store.record, event, detail)

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


def _known_modules(manifests: dict[str, Manifest]) -> dict[str, dict[str, Any]]:
    modules: dict[str, ModuleBase] = {}
    for manifest in manifests.values():
        for name, module in manifest.base.modules.items():
            modules.setdefault(name, module)
    return {name: module.model_dump(mode="json") for name, module in modules.items()}
