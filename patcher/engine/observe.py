"""The id of the change under way, in every log line of it, and what is told at its end."""

from __future__ import annotations

import functools
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, Protocol, TypeVar

from patcher.engine import spans
from patcher.engine.metrics import metrics
from patcher.errors import PatcherError

CHANGE: ContextVar[str] = ContextVar("patcher_change", default="")
logger = logging.getLogger("vllm.patcher")
P = ParamSpec("P")


class _Change(Protocol):
    """What is told of a change that was made."""

    @property
    def pause_ms(self) -> float:
        """The engine's stop."""

    @property
    def changed(self) -> bool:
        """Whether it changed anything."""


C = TypeVar("C", bound=_Change)


class _WithChange(logging.Filter):
    """Puts the id into each record: as its attribute ``change``, and before the message."""

    def filter(self, record: logging.LogRecord) -> bool:
        change = CHANGE.get()
        record.__dict__["change"] = change
        if change:
            record.msg = f"change={change} {record.msg}"
        return True


logger.addFilter(_WithChange())


def observed(change: Callable[P, Awaitable[C]]) -> Callable[P, Awaitable[C]]:
    """Give a change its id and span, and log and count its end. Errors get the id as a detail."""

    @functools.wraps(change)
    async def method(*args: P.args, **options: P.kwargs) -> C:
        token = CHANGE.set(secrets.token_hex(8))
        began = time.monotonic()
        try:
            with spans.span("change", change=CHANGE.get()):
                outcome = await change(*args, **options)
                word = "done" if outcome.changed else "unchanged"
                spans.tell(outcome=word, pause_ms=outcome.pause_ms)
        except BaseException as error:
            _failed(error, time.monotonic() - began)
            raise
        else:
            seconds = time.monotonic() - began
            logger.info("outcome=%s seconds=%.3f pause_ms=%.1f", word, seconds, outcome.pause_ms)
            metrics().ended(word, seconds, outcome.pause_ms if outcome.changed else None)
            return outcome
        finally:
            CHANGE.reset(token)

    return method


def cause_of(error: BaseException) -> str:
    """What ledger, log and metrics call the error."""
    return error.code if isinstance(error, PatcherError) else type(error).__name__


def _failed(error: BaseException, seconds: float) -> None:
    if isinstance(error, PatcherError):
        error.details.setdefault("change", CHANGE.get())
    cause = cause_of(error)
    told: Any = error.message if isinstance(error, PatcherError) else error
    logger.warning("outcome=%s seconds=%.3f cause=%s", cause, seconds, told)
    metrics().ended(cause, seconds)
