"""Calls to every rank of every engine, and what becomes of their answers."""

from __future__ import annotations

import secrets
from typing import Any

from patcher.engine import vllm_client
from patcher.engine.metrics import metrics
from patcher.engine.stack import Stack
from patcher.errors import EngineRefusedError, PatcherError, by_code

Reply = dict[str, Any]
STANDING = {"patcher_commit", "patcher_roll_back"}  # called while the engine stands still
Place = tuple[int, int]  # the data-parallel engine, and the rank in it


class Ranks:
    """All ranks of all engines behind one of vLLM's engine clients."""

    def __init__(self, client: Any) -> None:
        self.client = client

    async def call(self, method: str, *args: Any) -> list[Reply]:
        """Call every rank; raise what the first refusing rank reported."""
        nonce = secrets.token_hex(8)
        replies = await vllm_client.call_workers(self.client, method, nonce, *args)
        if any(reply.get("nonce") != nonce for reply in replies):
            raise EngineRefusedError(
                "The engine's replies are out of step.", "Restart the engine; its state is safe."
            )
        if method not in STANDING:
            metrics().stalled(max(reply.get("seconds", 0.0) for reply in replies))
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


def _named(reply: Reply) -> str:
    engine = f"Engine {reply['engine']}, rank" if reply["engine"] else "Rank"
    return f"{engine} {reply['rank']}"


def place(reply: Reply) -> Place:
    """Where a reply came from."""
    return reply["engine"], reply["rank"]


def agree(ranks: list[Reply], stack: Stack) -> bool:
    """Whether every rank serves ``stack``."""
    return all(tuple(rank["stack"]) == stack.ids for rank in ranks)


def refusal(what: str, error: BaseException) -> BaseException:
    """The error that a caller is to see: a typed one, or a refusal that names the cause."""
    if isinstance(error, PatcherError) or not isinstance(error, Exception):
        return error
    return EngineRefusedError(
        f"{what} ({type(error).__name__}: {error}).", "What was in force before still is."
    )
