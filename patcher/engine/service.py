"""One change of the stack, from intent to outcome, over every rank of every engine.

check what serves → stage (beside the live weights, while the engine serves) → pause → commit →
flush → weight version → resume → read back → guards → outcome on disk. Whatever fails on the
way, the stack before is put back, and the engine goes on only when that is done.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from patcher.engine import vllm_client
from patcher.engine.folder import LOCK_PATIENCE, too_long
from patcher.engine.guards import GuardRun
from patcher.engine.lifetimes import Lifetimes
from patcher.engine.metrics import metrics
from patcher.engine.observe import CHANGE, observed
from patcher.engine.outcome import Outcome, depths, outdated, told_of
from patcher.engine.ranks import Place, Ranks, agree, left_over, place
from patcher.engine.settings import DEFAULT_LONGEST
from patcher.engine.signatures import Trust
from patcher.engine.stack import Stack, admit, questions
from patcher.engine.stops import telling
from patcher.engine.store import Store
from patcher.engine.transition import Transition
from patcher.errors import (
    EngineRefusedError,
    PatcherError,
    UsageError,
)
from patcher.guards import Guard
from patcher.patch import Manifest, Patch
from patcher.protocol import InFlight

HEALTH_DEADLINE = 10.0  # seconds in which every rank must answer a probe
logger = logging.getLogger("vllm.patcher")


class PatchService:
    """The API-server process's hand on the engine. The truth stays in workers and store."""

    def __init__(
        self,
        client: Any,
        store: Store,
        spacing: float = DEFAULT_LONGEST,
        trust: Trust | None = None,
    ) -> None:
        self.client = client
        self.store = store
        self.trust = trust or Trust(store, None)
        self.ranks = Ranks(client)
        self.transition = Transition(self.ranks, store, spacing)
        self.lifetimes = Lifetimes(store)
        self.pauses: deque[float] = deque(maxlen=16)  # ms, of the last changes
        self.watched = True  # whether somebody reverts what is overdue
        self._turn = asyncio.Lock()

    # -- looking -----------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """What is in force, as the workers tell it."""
        ranks, version = await asyncio.gather(
            self.ranks.probe(), vllm_client.get_weight_version(self.client)
        )
        stack = self.store.in_force()
        manifests = await asyncio.to_thread(self.store.manifests)
        modules = stack.modules(manifests)
        settled = (
            agree(ranks, stack)
            and version in (None, stack.version)
            and not self.transition.stops.standing
        )
        return {
            "engine": {
                **vllm_client.describe(self.client),
                "patcher": ranks[0]["version"],
                "weight_version": version or None,
                "state": "ready" if settled else "changing",
            },
            "base": {n: manifests[ids[0]].base.modules[n].digest for n, ids in modules.items()},
            "stack": list(stack.ids),
            "weight_version": stack.version,
            "patches": self._patches_in_force(manifests),
            "modules": {name: list(ids) for name, ids in modules.items()},
            "trust": self.trust.told(),
            "overlaid": sorted({name for rank in ranks for name in rank["overlaid"]}),
            "processes": [
                {"engine": r["engine"], "rank": r["rank"], "pid": r["pid"], "plugin": r["version"]}
                for r in ranks
            ],
        }

    def _patches_in_force(self, manifests: dict[str, Manifest]) -> list[dict[str, Any]]:
        if self.store.suspended:
            return []
        since = self.store.since()
        ends = self.lifetimes.told([patch_id for patch_id, _ in since])
        return [
            {
                "id": patch_id,
                "title": manifests[patch_id].title,
                "since": moment,
                "expires": ends.get(patch_id),
                "modules": self.store.ranks(patch_id),
            }
            for patch_id, moment in since
        ]

    async def verify(self) -> dict[str, Any]:
        """Compare the live weights on every rank with what (base, stack) must give.

        Reads every module that a patch of this engine ever changed, one between two steps:
        patched ones against the fold of the stack, the others against their base.
        """
        async with self.exclusive():
            stack = self.store.in_force()
            ranks = await self.ranks.probe()
            await vllm_client.check_awake(self.client)
            found: dict[Place, dict[str, Any]] = {place(rank): {} for rank in ranks}
            for name, module in await asyncio.to_thread(self.store.known_modules):
                for reply in await self.ranks.call("patcher_verify", name, module):
                    if reply["verdict"] is not None:
                        found[place(reply)][name] = reply["verdict"]
            modules: dict[str, bool] = {}
            for verdicts in found.values():
                for name, verdict in verdicts.items():
                    modules[name] = modules.get(name, True) and bool(verdict["ok"])
            await self.transition.note_drift([n for n, ok in sorted(modules.items()) if not ok])
        return {
            "ok": agree(ranks, stack) and all(modules.values()),
            "modules": dict(sorted(modules.items())),
            "weight_version": stack.version,
            "ranks": [
                {key: rank[key] for key in ("engine", "rank", "stack")}
                | {"modules": found[place(rank)]}
                for rank in ranks
            ],
        }

    async def health(self) -> list[str]:
        """What is wrong, as words for a program; nothing where all is well. Reads no weights."""
        wrong: list[str] = []
        try:
            if self.store.drift:
                wrong.append("drift")
            if self.transition.stops.standing:
                wrong.append("rollback-incomplete")
            stack = self.store.in_force()
            changing = await asyncio.to_thread(self.store.changing)
        except PatcherError:
            return [*wrong, "no-state"]
        try:
            async with asyncio.timeout(HEALTH_DEADLINE):
                ranks = await self.ranks.probe()
        except (PatcherError, TimeoutError):
            return [*wrong, "no-answer"]
        # In the midst of a change, which may have begun meanwhile, ranks and store may differ.
        if not changing and not agree(ranks, stack) and stack == self.store.in_force():
            changing = await asyncio.to_thread(self.store.changing)
            wrong += [] if changing else ["ranks-disagree"]
        return wrong

    async def heal(self, actor: str = "", client: str = "") -> dict[str, Any]:
        """Put the stack back where a weight reload brought base weights back; then verify.

        ``actor`` and ``client``: who asked, for the ledger.

        Raises :class:`VerificationError` where a live weight is neither what was put there
        nor its base.
        """
        async with self.exclusive():
            await self._reconcile("repair")
            by = {"actor": actor, "client": client}
            await self.transition.heal(self.store.in_force(), by)
        return await self.verify()

    # -- changing ----------------------------------------------------------------------------

    async def restore(self, occasion: str = "start", *, fresh: bool = False) -> None:
        """Bring the engine to the stack that must be in force, before it serves.

        Waits as long as another API server restores: the lock dies with that process. ``fresh``:
        the engine was just loaded, so nothing is left of weights that something changed.
        """
        async with self.exclusive(patience=math.inf):
            await asyncio.to_thread(self.trust.check_restored, self.store.in_force().ids)
            await self._reconcile(occasion)
            stack = self.store.in_force()
            await vllm_client.set_weight_version(self.client, stack.version)
            if fresh:
                await self.transition.note_drift([])
            metrics().in_force(stack.ids)

    @observed
    async def change(
        self,
        ids: list[str],
        *,
        if_match: str,
        in_flight: InFlight,
        actor: str,
        client: str = "",
        reason: str = "",
        guards: Sequence[Guard] = (),
        ttl: float | None = None,
        only_if: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Make ``ids`` the stack in force, on every rank or on none.

        ``client``: what ``actor`` asked with, for the ledger. ``ttl``: seconds after which the
        patches that this adds are reverted, unless somebody confirms them. ``only_if`` is
        called before anything changes, while no other change can; what it raises ends this one.

        Raises :class:`StackChangedError` where ``if_match`` isn't the weight version in force,
        :class:`StackRacedError` where it was until another change ended first,
        :class:`VerificationError` where something else changed the live weights,
        :class:`TrustError` where the policy doesn't admit a patch,
        :class:`GuardBreachedError` where one of ``guards`` didn't hold, what :func:`admit`
        raises, and what a rank refused with.
        """
        began = time.monotonic()
        arrived = self.store.in_force()  # at once: a thread may be late
        async with self.exclusive():
            await self._reconcile("repair")
            before = self.store.in_force()
            manifests = await asyncio.to_thread(self.store.manifests)
            target = admit(ids, manifests)
            if target == before and not self.store.suspended:
                # A retry of a change whose answer got lost. That one began what runs out.
                if ttl is not None and not self.store.expiries().keys() & set(target.ids):
                    self._check_lifetime([])
                return Outcome(before, time.monotonic() - began, changed=False)
            if if_match != before.version:
                raise outdated(if_match, before, raced=if_match == arrived.version)
            only_if()
            added = [i for i in target.ids if i not in before.ids]
            # What is in force already was checked when it came, and at the start.
            signers = await asyncio.to_thread(self.trust.check, added)
            if ttl is not None:
                self._check_lifetime(added)
            asked = GuardRun(self.client, guards)
            await asked.prepare()
            detail: dict[str, Any] = {
                "change": CHANGE.get(),
                "actor": actor,
                "client": client,
                "reason": reason,
                "before": list(before.ids),
                "after": list(target.ids),
            }
            if ttl is not None:
                detail["ttl"] = ttl
            if signers:
                detail["signers"] = signers
            await self._record("change-intent", {**detail, "in_flight": in_flight})
            logger.info("actor=%s in_flight=%s stack=%s", actor, in_flight, depths(before, target))
            try:

                def done(digests: dict[str, list[str]]) -> None:
                    told = {**detail, "outcome": "done", "digests": digests, **asked.told()}
                    kept = {i: e for i, e in self.store.expiries().items() if i not in added}
                    new = {} if ttl is None else self.lifetimes.begin(added, ttl)
                    self.store.commit(target, "change-done", told, {**kept, **new})

                swapped = await self.transition.run(
                    [before], target, before, in_flight, done, asked.confirm
                )
            except BaseException as error:
                told = {**detail, "outcome": "failed", **told_of(error), **asked.told()}
                await self._record_if_possible("change-failed", told)
                raise
            metrics().in_force(target.ids)
            self.pauses.append(swapped.pause_ms)
        kept = Stack(tuple(i for i in before.ids if i in target.ids))
        asking = questions(kept, added, manifests)
        return Outcome(target, time.monotonic() - began, swapped, asked.results, asking)

    def _check_lifetime(self, added: list[str]) -> None:
        if not added:
            raise UsageError(
                "This change adds no patch that could have a time to live.",
                "Leave `ttl` out; a patch in force keeps the deadline that it has.",
            )
        if not self.watched:
            raise EngineRefusedError(
                "Nothing in this process would end a time to live.",
                "Revert when it is time, or serve the model with `patcher serve`.",
            )

    async def _reconcile(self, occasion: str) -> None:
        """Bring workers that serve another stack than the recorded one back to it."""
        await self._record_interruption()
        ranks = await self.ranks.probe()
        await vllm_client.check_awake(self.client)
        stack, stops = self.store.in_force(), self.transition.stops
        await stops.tidy()
        standing = stops.standing
        if standing or not agree(ranks, stack):
            for change_id in left_over(ranks) or {""}:
                with telling():
                    async with stops.stopped("recompute", ours=standing) as pause:
                        await self.transition.put_back(change_id, stack, pause)
            ranks = await self.ranks.probe()
        else:
            for change_id in left_over(ranks):  # it succeeded, and only its end was lost
                await self.transition.discard(change_id)
        if not agree(ranks, stack):
            served = [Stack(tuple(r["stack"])) for r in ranks]

            def done(digests: dict[str, list[str]]) -> None:
                detail = {"stack": list(stack.ids), "digests": digests}
                self.store.record(f"{occasion}-restored", detail)

            await self.transition.run(served, stack, served[0], "recompute", done)

    async def _record_interruption(self) -> None:
        interrupted = await asyncio.to_thread(self.store.interrupted)
        if interrupted is not None:
            await self._record("change-interrupted", {**interrupted, "outcome": "interrupted"})

    async def _record(self, event: str, detail: dict[str, Any]) -> None:
        await asyncio.to_thread(self.store.record, event, detail)

    async def _record_if_possible(self, event: str, detail: dict[str, Any]) -> None:
        try:
            await self._record(event, detail)
        except PatcherError:  # the error that is on its way says more
            logger.exception("patcher: %s could not be recorded", event)

    @asynccontextmanager
    async def exclusive(self, patience: float = LOCK_PATIENCE) -> AsyncIterator[None]:
        """One change at a time: in this process, and across the processes that share the store.

        Raises :class:`StackConflictError` after ``patience`` seconds.
        """
        until = time.monotonic() + patience
        async with self._own_turn(patience):
            lock = self.store.exclusive(patience, until)
            entering = asyncio.ensure_future(asyncio.to_thread(lock.__enter__))
            try:
                await asyncio.shield(entering)
            except asyncio.CancelledError:
                # The thread goes on: what it gets in the end nobody would give back.
                entering.add_done_callback(
                    lambda got: got.exception() or lock.__exit__(None, None, None)
                )
                raise
            try:
                yield
            finally:
                lock.__exit__(None, None, None)

    @asynccontextmanager
    async def _own_turn(self, patience: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(None if patience == math.inf else patience):
                await self._turn.acquire()
        except TimeoutError:
            raise too_long(patience) from None
        try:
            yield
        finally:
            self._turn.release()

    async def confirm(self, ids: Sequence[str] | None, actor: str, client: str = "") -> list[str]:
        """:meth:`Lifetimes.confirm`, once no change is under way."""
        async with self.exclusive():
            return await asyncio.to_thread(self.lifetimes.confirm, ids, actor, client)

    def upload(self, data: bytes, actor: str, client: str = "") -> tuple[Patch, bool]:
        """Check a file's bytes and store them; the second value is False if it was there."""
        patch = Patch.from_bytes(data)
        return patch, self.store.add_patch(patch, actor, client)
