"""Time to live: patches that revert by themselves unless somebody confirms them.

Every API server of an engine runs the same loop; the lock and the compare-and-swap of a change
make each revert happen once. While a server runs it counts with a clock that nobody can set;
the wall clock's time in the store is for the next start.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from patcher.engine import expiries
from patcher.engine.expiries import Expiry
from patcher.engine.store import Store
from patcher.errors import PatcherError, StackChangedError, StackConflictError, UnknownPatchError
from patcher.moments import utc
from patcher.text import shown

if TYPE_CHECKING:
    from patcher.engine.service import PatchService

ACTOR = "ttl"  # who reverts, in the ledger
LOOK_EVERY = 1.0  # seconds: another API server may have put a patch on
RETRY_AFTER, RETRY_MOST = 5.0, 300.0  # seconds after a revert that failed, doubled each time
logger = logging.getLogger("vllm.patcher")


class Lifetimes:
    """The deadlines of one store, against this process's clocks (seconds)."""

    def __init__(
        self,
        store: Store,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._wall = wall
        self.steady = steady
        self._due: dict[tuple[str, Expiry], float] = {}  # by the steady clock

    def begin(self, ids: Sequence[str], ttl: float) -> dict[str, Expiry]:
        """Expiries ``ttl`` seconds from now."""
        return dict.fromkeys(ids, Expiry(self._wall() + ttl, ttl))

    def overdue(self) -> set[str]:
        """The patches whose own time is over."""
        found = set(self._store.expiries().items())
        # A clock that was set back while no server ran doesn't give more than the whole time.
        self._due = {
            key: self._due.get(key, self.steady() + min(key[1].deadline - self._wall(), key[1].ttl))
            for key in found
        }
        return {key[0] for key, due in self._due.items() if due <= self.steady()}

    def told(self, ids: Sequence[str]) -> dict[str, str]:
        """When each of the stack's ``ids`` ends, in UTC (RFC 3339); nothing for those that stay."""
        own = {i: one.deadline for i, one in self._store.expiries().items()}
        ends = expiries.deadlines(ids, self._store.manifests(), own) if own else {}
        return {i: utc(at) for i, at in ends.items()}

    def confirm(self, ids: Sequence[str] | None, actor: str, client: str = "") -> list[str]:
        """Make patches stay, all of the stack where ``ids`` is None; returns those that would not.

        Whoever calls holds the right to change the stack. Raises :class:`UnknownPatchError` for
        an id that isn't in force, and :class:`StackConflictError` for one that requires another
        whose time runs.
        """
        stack = self._store.in_force().ids
        wanted = list(stack if ids is None else ids)
        for patch_id in wanted:
            if patch_id not in stack:
                raise UnknownPatchError(
                    f"No patch {shown(patch_id)} is in force.",
                    "It may have ended; apply it again.",
                )
        held = self._store.expiries()
        running = expiries.deadlines(
            stack, self._store.manifests(), {i: 0.0 for i in held if i not in wanted}
        )
        for patch_id in wanted:
            if patch_id in running:
                raise StackConflictError(
                    f"Patch {patch_id[:16]} requires another whose time to live runs.",
                    "Confirm that one too, or all: it would take this one with it.",
                )
        confirmed = [i for i in wanted if i in held]
        if confirmed:
            detail = {"actor": actor, "client": client, "patches": confirmed}
            self._store.confirm(confirmed, "ttl-confirmed", detail)
        return confirmed


async def expire(service: PatchService) -> None:
    """Revert what is overdue, and what requires it; nothing where nothing is.

    Raises what :meth:`PatchService.change` raises.
    """
    store = service.store
    overdue = await asyncio.to_thread(service.lifetimes.overdue)
    stack = store.in_force()
    over = {i: 0.0 for i in stack.ids if i in overdue}
    if not over:
        return
    gone = expiries.deadlines(stack.ids, await asyncio.to_thread(store.manifests), over)

    def still() -> None:
        if not over.keys() <= service.lifetimes.overdue():
            raise StackChangedError("A patch was confirmed or reverted meanwhile.")

    reason = f"time to live of {_named(over)} ended"
    if others := [i for i in gone if i not in over]:
        reason += f"; {_named(others)} required it"
    change = service.change(
        [i for i in stack.ids if i not in gone],
        if_match=stack.version,
        in_flight="recompute",
        actor=ACTOR,
        reason=reason,
        only_if=still,
    )
    try:
        await asyncio.shield(asyncio.ensure_future(change))  # never left half-way
    except StackChangedError:
        return  # another API server or a person was quicker; the next look tells
    logger.info("patcher: %s", reason)


async def watch(service: PatchService) -> None:
    """Revert what is overdue, for as long as the server runs."""
    wait = RETRY_AFTER
    while True:
        try:
            await expire(service)
            wait = RETRY_AFTER
            await asyncio.sleep(LOOK_EVERY)
        except Exception as error:
            unforeseen = not isinstance(error, PatcherError)
            logger.error(
                "patcher: a patch whose time is over could not be reverted: %s",
                error,
                exc_info=unforeseen,
            )
            await asyncio.sleep(wait)
            wait = min(2 * wait, RETRY_MOST)


def _named(ids: Sequence[str] | dict[str, float]) -> str:
    return ", ".join(i[:12] for i in ids)
