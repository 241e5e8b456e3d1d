"""Each answer tells which weights it came from: an ASGI middleware around vLLM's own routes.

vLLM stamps what the engine sends with the weight version and keeps, for each request, the
output token at which a version began. A request is tied to its HTTP answer by a context
variable, so nothing is asked and nothing is guessed, also with several API servers. Bodies pass
as they come; only the head of an answer waits for its first byte, since before that nobody knows
which weights it will come from.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from patcher.engine.mixed import MixedRequests

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

VERSION = b"x-patcher-weight-version"
SINCE = b"x-patcher-weight-version-since"
MIXED = b"x-patcher-mixed"

# The requests to the engine that belong to the HTTP request under way: vLLM's states of them.
_states: ContextVar[list[Any] | None] = ContextVar("patcher_requests", default=None)


def seen(state: Any) -> None:
    """Note a request that vLLM just took; called where it was made."""
    states = _states.get()
    if states is not None:
        states.append(state)


def spans(states: Iterable[Any]) -> list[tuple[str, int]]:
    """Each weight version that made tokens, in order, with the first output token of it.

    Of several sequences in one answer: those of the one that met most, then what only others met.
    """
    starts: list[list[tuple[str, int]]] = [state.weight_version_starts for state in states]
    starts.sort(key=len, reverse=True)
    found = list(starts[0]) if starts else []
    for version, token in (one for each in starts for one in each):
        if all(version != known for known, _ in found):
            found.append((version, token))
    return found


class WeightVersionMiddleware:
    """Adds the headers, and in event streams a comment where the weights changed."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        plugin = getattr(scope["app"].state, "patcher", None) if scope["type"] == "http" else None
        mixed = getattr(plugin, "mixed", None)
        if mixed is None:
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, mixed)
        token = _states.set(answer.states)
        try:
            await self.app(scope, receive, answer.send)
        finally:
            _states.reset(token)


class _Answer:
    """One answer on its way out."""

    def __init__(self, send: Send, mixed: MixedRequests) -> None:
        self.states: list[Any] = []
        self._send = send
        self._mixed = mixed
        self._head: Message | None = None
        self._told = 0  # versions
        self._comments = False
        self._between = True  # two events of a stream

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            return
        if self._head is not None:
            head, self._head = self._head, None
            await self._send(self._with_versions(head))
        if self._comments and message["type"] == "http.response.body":
            message = self._commented(message)
        await self._send(message)

    def _with_versions(self, head: Message) -> Message:
        headers = list(head.get("headers", ()))
        kinds = {name.lower(): value for name, value in headers}
        stream = kinds.get(b"content-type", b"").startswith(b"text/event-stream")
        self._comments = stream and kinds.keys().isdisjoint(
            (b"content-encoding", b"content-length")
        )
        found = spans(self.states)
        if not found:  # a stream may begin with an event before its first token
            return head
        self._told = len(found)
        headers.append((VERSION, ", ".join(version for version, _ in found).encode()))
        headers.append((SINCE, ", ".join(str(token) for _, token in found).encode()))
        if self._is_mixed():
            headers.append((MIXED, b"true"))
        return {**head, "headers": headers}

    def _commented(self, message: Message) -> Message:
        """The next piece of a stream, with a comment before it where the weights changed."""
        body = message.get("body", b"")
        between = self._between
        if body:
            self._between = body.endswith(b"\n\n")
        fresh = spans(self.states)[self._told :] if between else []
        if not fresh:
            return message
        self._told += len(fresh)
        mark = " mixed" if self._is_mixed() else ""
        lines = [f": patcher weight-version={v} since-token={t}{mark}\n\n" for v, t in fresh]
        return {**message, "body": "".join(lines).encode() + body}

    def _is_mixed(self) -> bool:
        return self._mixed.has_any(state.request_id for state in self.states)
