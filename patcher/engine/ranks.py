"""Calls to every rank of every engine, and what becomes of their answers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from patcher.engine import vllm_client
from patcher.engine.metrics import metrics
from patcher.engine.stack import Stack
from patcher.errors import EngineRefusedError, PatcherError, by_code

Reply = dict[str, Any]
STANDING = {"patcher_commit", "patcher_roll_back"}  # called while the engine stands still
AT_ONCE = 0.02  # seconds that calls take together which are made at once
_LEAST = 0.001  # that a call is taken to need
Place = tuple[int, int]  # the data-parallel engine, and the rank in it


class Ranks:
    """All ranks of all engines behind one of vLLM's engine clients."""

    def __init__(self, client: Any) -> None:
        self.client = client

    async def call(self, method: str, *args: Any) -> list[Reply]:
        """Call every rank; raise what the first refusing rank reported."""
        (replies,) = await self.together((method, *args))
        return replies

    async def together(self, *calls: tuple[Any, ...]) -> list[list[Reply]]:
        """Make calls (a method and its arguments each) at once: no step comes between them.

        Every rank takes them in this order, since each way to it is a queue. All have ended when
        this returns, or raises what the first that failed raised.
        """
        done = await asyncio.gather(*(self._ask(*one) for one in calls), return_exceptions=True)
        served = [r for (method, *_), r in zip(calls, done, strict=True) if method not in STANDING]
        replies: list[list[Reply]] = []
        if took := [_seconds(one) for one in served if not isinstance(one, BaseException)]:
            metrics().stalled(sum(took))
        for one in done:
            if isinstance(one, BaseException):
                raise one
            replies.append(one)
        return replies

    async def each(
        self, method: str, calls: Sequence[tuple[Any, ...]], within: float | None = None
    ) -> list[list[Reply]]:
        """Call ``method`` with each of ``calls``: one, then as many at once as take a moment.

        So no step waits for more than one call, or for more than :data:`AT_ONCE` where calls are
        quick. ``within``: seconds of work after which no further call is begun; the replies are
        those of the first calls then.
        """
        replies: list[list[Reply]] = []
        slowest = spent = 0.0
        while left := calls[len(replies) :]:
            if within is not None and spent + slowest > within:
                break
            room = AT_ONCE if within is None else min(AT_ONCE, within - spent)
            count = int(room / slowest) if replies else 1
            group = await self.together(*((method, *args) for args in left[: max(1, count)]))
            replies += group
            spent += sum(map(_seconds, group))
            slowest = max(slowest, _LEAST, *map(_seconds, group))
        return replies

    async def _ask(self, method: str, *args: Any) -> list[Reply]:
        nonce = secrets.token_hex(8)
        replies = await vllm_client.call_workers(self.client, method, nonce, *args)
        if any(reply.get("nonce") != nonce for reply in replies):
            raise EngineRefusedError(
                "The engine's replies are out of step.", "Restart the engine; its state is safe."
            )
        for reply in replies:
            if not reply["ok"]:
                kind = by_code(reply["error"])
                kind = EngineRefusedError if kind is PatcherError else kind
                raise kind(f"{_named(reply)}: {reply['detail']}", reply["cure"])
        return replies

    async def probe(self) -> list[Reply]:
        """What each rank runs and holds.

        Raises :class:`EngineRefusedError` where a process lacks the plugin, or doesn't answer.
        """
        try:
            return await self.call("patcher_probe")
        except PatcherError:
            raise
        except Exception as error:
            if "patcher_probe" not in str(error):
                raise refusal("The engine doesn't answer", error) from error
            raise EngineRefusedError(
                "The engine's workers don't have the plugin.",
                "Name `patcher` in VLLM_PLUGINS for every process of the engine, before it starts.",
            ) from error


def _seconds(replies: list[Reply]) -> float:
    """How long the slowest rank worked for a call."""
    return max(float(reply.get("seconds", 0.0)) for reply in replies)


def _named(reply: Reply) -> str:
    engine = f"Engine {reply['engine']}, rank" if reply["engine"] else "Rank"
    return f"{engine} {reply['rank']}"


def place(reply: Reply) -> Place:
    """Where a reply came from."""
    return reply["engine"], reply["rank"]


def agree(ranks: list[Reply], stack: Stack) -> bool:
    """Whether every rank serves ``stack``."""
    return all(tuple(rank["stack"]) == stack.ids for rank in ranks)


def left_over(ranks: list[Reply]) -> set[str]:
    """The changes that some rank still holds."""
    return {rank["change"] for rank in ranks if rank["change"]}


def refusal(what: str, error: BaseException) -> BaseException:
    """The error that a caller is to see: a typed one, or a refusal that names the cause."""
    if isinstance(error, PatcherError) or not isinstance(error, Exception):
        return error
    return EngineRefusedError(
        f"{what} ({type(error).__name__}: {error}).", "What was in force before still is."
    )
