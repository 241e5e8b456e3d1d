"""One change of the stack, from intent to outcome, over every rank of every engine.

check what serves → stage (beside the live weights, while the engine serves) → pause → commit →
flush → weight version → resume → read back → guards → outcome on disk. Whatever fails on the
way, the stack before is put back, and the engine goes on only when that is done.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from patcher.engine import vllm_client
from patcher.engine.guards import GuardRun
from patcher.engine.lifetimes import Lifetimes
from patcher.engine.metrics import metrics
from patcher.engine.observe import CHANGE, cause_of, observed
from patcher.engine.ranks import Place, Ranks, agree, left_over, place
from patcher.engine.settings import DEFAULT_LONGEST
from patcher.engine.signatures import Trust
from patcher.engine.stack import Stack, admit, questions
from patcher.engine.store import Store
from patcher.engine.transition import Swapped, Transition
from patcher.errors import (
    EngineRefusedError,
    PatcherError,
    StackChangedError,
    StackRacedError,
    UsageError,
)
from patcher.guards import Guard
from patcher.patch import Manifest, Patch
from patcher.protocol import GuardResult, InFlight
from patcher.text import shown

HEALTH_DEADLINE = 10.0  # seconds in which every rank must answer a probe
logger = logging.getLogger("vllm.patcher")


@dataclass(frozen=True)
class Outcome:
    """What a change led to. ``seconds`` is all of it, ``swapped`` what it cost."""

    stack: Stack
    seconds: float
    swapped: Swapped = field(default_factory=Swapped)
    guards: Sequence[GuardResult] = ()
    questions: Sequence[str] = ()
    change: str = field(default_factory=CHANGE.get)

    @property
    def pause_ms(self) -> float:
        """The engine's stop."""
        return self.swapped.pause_ms

    def as_dict(self) -> dict[str, Any]:
        """The wire form."""
        return {
            "change": self.change,
            "stack": list(self.stack.ids),
            "weight_version": self.stack.version,
            "seconds": round(self.seconds, 4),
            "pause_ms": round(self.swapped.pause_ms, 2),
            "mixed": self.swapped.mixed,
            "spaced_ms": round(self.swapped.spaced_ms, 2),
            "guards": list(self.guards),
            "questions": list(self.questions),
        }


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
            agree(ranks, stack) and version in (None, stack.version) and not self.store.unclean
        )
        return {
            "engine": {
                **vllm_client.describe(self.client),
                "patcher": ranks[0]["version"],
                "weight_version": version,
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
            found: dict[Place, dict[str, Any]] = {place(rank): {} for rank in ranks}
            for name, module in await asyncio.to_thread(self.store.known_modules):
                for reply in await self.ranks.call("patcher_verify", name, module):
                    if reply["verdict"] is not None:
                        found[place(reply)][name] = reply["verdict"]
        modules: dict[str, bool] = {}
        for verdicts in found.values():
            for name, verdict in verdicts.items():
                modules[name] = modules.get(name, True) and bool(verdict["ok"])
        await self.transition.note_drift([name for name, ok in sorted(modules.items()) if not ok])
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
        if await asyncio.to_thread(self.store.changing):
            return []  # ranks and store may differ in the midst of a change
        wrong = ["drift"] if self.store.drift else []
        if self.store.unclean:
            wrong.append("rollback-incomplete")
        try:
            async with asyncio.timeout(HEALTH_DEADLINE):
                if not agree(await self.ranks.probe(), self.store.in_force()):
                    wrong.append("ranks-disagree")
        except (PatcherError, TimeoutError):
            wrong.append("no-answer")
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

    async def restore(self, occasion: str = "start") -> None:
        """Bring the engine to the stack that must be in force, before it serves."""
        async with self.exclusive():
            await asyncio.to_thread(self.trust.check_restored, self.store.in_force().ids)
            await self._reconcile(occasion)
            stack = self.store.in_force()
            await vllm_client.set_weight_version(self.client, stack.version)
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
                # A retry of a change whose answer got lost.
                return Outcome(before, time.monotonic() - began)
            if if_match != before.version:
                raise _outdated(if_match, before, raced=if_match == arrived.version)
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
            logger.info("actor=%s in_flight=%s stack=%s", actor, in_flight, _depths(before, target))
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
                told = {**detail, "outcome": "failed", "cause": cause_of(error), **asked.told()}
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
        stack = self.store.in_force()
        if self.store.unclean or not agree(ranks, stack):
            for change_id in left_over(ranks) or {""}:
                async with vllm_client.paused(
                    self.client, "recompute", ours=self.store.unclean
                ) as pause:
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
    async def exclusive(self) -> AsyncIterator[None]:
        """One change at a time: in this process, and across the processes that share the store."""
        async with self._turn:
            lock = self.store.exclusive()
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

    def upload(self, data: bytes, actor: str, client: str = "") -> tuple[Patch, bool]:
        """Check a file's bytes and store them; the second value is False if it was there."""
        patch = Patch.from_bytes(data)
        return patch, self.store.add_patch(patch, actor, client)


def _depths(before: Stack, target: Stack) -> str:
    return f"{len(before.ids)}->{len(target.ids)}"


def _outdated(if_match: str, stack: Stack, *, raced: bool) -> StackChangedError:
    """The error of a wish that was based on another stack than ``stack``, the one in force."""
    kind = StackRacedError if raced else StackChangedError
    cause = "Another change, asked for at once, was first" if raced else "It was changed"
    return kind(
        f"{cause}: the weight version in force is {stack.version[:16]}, not {shown(if_match)}.",
        "Look at `patcher status` and try again.",
        stack=list(stack.ids),
        weight_version=stack.version,
    )
