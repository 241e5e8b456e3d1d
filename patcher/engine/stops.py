"""Our stops of the engine, and what is known of one that did not end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

from patcher.engine import vllm_client
from patcher.engine.observe import cause_of
from patcher.engine.store import Store
from patcher.errors import EngineRefusedError, PatcherError
from patcher.protocol import InFlight

logger = logging.getLogger("vllm.patcher")


class Stops:
    """The stops that changes of this engine make.

    That one did not end, or the rollback in it, stands in the store, for every API server of the
    engine; where the store can't be written, this process alone knows.
    """

    def __init__(self, client: Any, store: Store) -> None:
        self._client = client
        self._store = store
        self._held = False  # a stop that did not end, and isn't marked
        self._stale = False  # a mark that could not be taken back

    @property
    def standing(self) -> bool:
        """Whether a stop of ours did not end."""
        return self._held or (self._store.unclean and not self._stale)

    @contextlib.asynccontextmanager
    async def stopped(
        self, in_flight: InFlight, deadline: float | None = None, *, ours: bool = False
    ) -> AsyncIterator[vllm_client.Pause]:
        """:func:`vllm_client.paused`; a stop that doesn't end is known as ours by the next one.

        Raises :class:`EngineRefusedError` where the engine doesn't go on, with what came first.
        """
        pause = vllm_client.Pause(ours=ours or self._held)
        inside: BaseException | None = None
        try:
            async with vllm_client.paused(self._client, pause, in_flight, deadline):
                try:
                    yield pause
                except BaseException as error:
                    inside = error
                    raise
        except Exception as error:
            if error is inside or not pause.standing:
                raise
            what = f"The engine did not go on ({error})"
            raise stands_still(inside or error, what, first=inside is not None) from error
        finally:
            self._held = pause.standing and not await self.mark(True)

    async def mark(self, unclean: bool) -> bool:
        """Tell other processes that a stop doesn't end, or that it did; whether that was stored.

        A disk that fails keeps no weight from its place: the caller goes on.
        """
        try:
            await asyncio.to_thread(self._store.set_unclean, unclean)
        except Exception:
            logger.exception("patcher: whether the engine stands still could not be stored")
            self._stale = not unclean
            return False
        self._stale = False
        return True

    async def tidy(self) -> None:
        """Take back a mark that could not be taken back when its stop ended."""
        if self._stale:
            await self.mark(False)


@contextlib.contextmanager
def telling(cause: BaseException | None = None) -> Iterator[None]:
    """Inside, what ``cause`` led to is put back; where that fails, both are told."""
    try:
        yield
    except Exception as trouble:
        what = f"What was in force before could not be put back ({trouble})"
        raise stands_still(cause or trouble, what, first=cause is not None) from (cause or trouble)


def stands_still(cause: BaseException, what: str, *, first: bool = True) -> EngineRefusedError:
    """The error of a change after which the engine stands still.

    ``cause``: what it came of; ``first``: that isn't in ``what`` already.
    """
    told = cause.message if isinstance(cause, PatcherError) else f"{type(cause).__name__}: {cause}."
    return EngineRefusedError(
        f"{f'{told} ' if first else ''}{what}: the engine stands still until that is mended.",
        "The next change mends it first, and so does a restart: the state is safe.",
        cause=cause_of(cause),
        stands_still=True,
    )
