"""The middleware alone, over an app that is played; ``test_under_load.py`` has vLLM's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from patcher.engine.mixed import MixedRequests
from patcher.engine.stamp import WeightVersionMiddleware, seen, spans

STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


def state(*starts: tuple[str, int], name: str = "r") -> Any:
    return SimpleNamespace(request_id=name, weight_version_starts=list(starts))


def answer(app: Callable[[Any], Any], mixed: MixedRequests | None) -> list[dict[str, Any]]:
    """What goes out when ``app(send)`` answers one request."""
    out: list[dict[str, Any]] = []
    plugin = SimpleNamespace(mixed=mixed)
    scope = {"type": "http", "app": SimpleNamespace(state=SimpleNamespace(patcher=plugin))}

    async def send(message: Any) -> None:
        out.append(message)

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await app(send)

    asyncio.run(WeightVersionMiddleware(inner)(scope, None, send))  # type: ignore[arg-type]
    return out


def start(headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": headers}


def body(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def test_a_change_is_told_between_two_events_and_never_inside_one(tmp_path: Path) -> None:
    one = state(("v1", 0))
    mixed = MixedRequests(tmp_path)

    async def app(send: Any) -> None:
        await send(start(STREAM))
        seen(one)
        await send(body(b"data: half"))
        mixed.add(["r"])
        one.weight_version_starts.append(("v2", 7))
        await send(body(b" done\n\n"))
        await send(body(b"data: 2\n\n"))
        await send(body(b"data: [DONE]\n\n", more=False))

    head, *pieces = answer(app, mixed)
    assert head["headers"][1:] == [
        (b"x-patcher-weight-version", b"v1"),
        (b"x-patcher-weight-version-since", b"0"),
    ]
    assert [piece["body"] for piece in pieces] == [
        b"data: half",
        b" done\n\n",
        b": patcher weight-version=v2 since-token=7 mixed\n\ndata: 2\n\n",
        b"data: [DONE]\n\n",
    ]


def test_a_stream_that_begins_before_its_first_token_tells_the_version_in_a_comment(
    tmp_path: Path,
) -> None:
    one = state()

    async def app(send: Any) -> None:
        await send(start(STREAM))
        seen(one)
        await send(body(b"event: created\n\n"))
        one.weight_version_starts.append(("v1", 0))
        await send(body(b"data: 1\n\n", more=False))

    head, first, second = answer(app, MixedRequests(tmp_path))
    assert head["headers"] == STREAM
    assert first["body"] == b"event: created\n\n"
    assert second["body"] == b": patcher weight-version=v1 since-token=0\n\ndata: 1\n\n"


def test_an_answer_that_is_not_streamed_lists_all_and_says_that_it_is_mixed(tmp_path: Path) -> None:
    mixed = MixedRequests(tmp_path)
    mixed.add(["r"])

    async def app(send: Any) -> None:
        seen(state(("v1", 0), ("v2", 17)))
        await send(start([]))
        await send(body(b"{}", more=False))

    head, _ = answer(app, mixed)
    assert head["headers"] == [
        (b"x-patcher-weight-version", b"v1, v2"),
        (b"x-patcher-weight-version-since", b"0, 17"),
        (b"x-patcher-mixed", b"true"),
    ]


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-type", b"application/json")],
        [*STREAM, (b"content-encoding", b"gzip")],
        [*STREAM, (b"content-length", b"4")],
    ],
)
def test_what_is_no_plain_event_stream_is_left_alone(
    tmp_path: Path, headers: list[tuple[bytes, bytes]]
) -> None:
    one = state(("v1", 0))

    async def app(send: Any) -> None:
        seen(one)
        await send(start(headers))
        await send(body(b"a\n\n"))
        one.weight_version_starts.append(("v2", 7))
        await send(body(b"b", more=False))

    _, *pieces = answer(app, MixedRequests(tmp_path))
    assert [piece["body"] for piece in pieces] == [b"a\n\n", b"b"]


@pytest.mark.parametrize("off", [True, False])
def test_without_tokens_or_without_patcher_nothing_is_added(tmp_path: Path, off: bool) -> None:
    async def app(send: Any) -> None:
        if off:
            seen(state(("v1", 0)))
        await send(start(STREAM))
        await send(body(b"", more=False))

    assert answer(app, None if off else MixedRequests(tmp_path)) == [
        start(STREAM),
        body(b"", more=False),
    ]


def test_requests_belong_to_the_answer_that_they_were_made_for(tmp_path: Path) -> None:
    async def app(send: Any) -> None:
        async def background() -> None:
            seen(state(("v1", 0)))

        await asyncio.create_task(background())  # as vLLM does: a task of its own
        await send(start([]))
        await send(body(b"", more=False))

    seen(state(("other", 0)))  # nobody's
    head, _ = answer(app, MixedRequests(tmp_path))
    assert (b"x-patcher-weight-version", b"v1") in head["headers"]


def test_spans_of_several_sequences() -> None:
    assert spans([]) == []
    assert spans([state(), state(("v1", 0))]) == [("v1", 0)]
    assert spans([state(("v1", 0), ("v2", 5), ("v1", 9)), state(("v3", 0))]) == [
        ("v1", 0),
        ("v2", 5),
        ("v1", 9),
        ("v3", 0),
    ]


def test_mixed_requests_are_read_by_another_process_as_they_are_added(tmp_path: Path) -> None:
    writer, reader = MixedRequests(tmp_path), MixedRequests(tmp_path)
    assert not reader.has_any(["a"])
    writer.add(["a"])
    assert reader.has_any(["x", "a"])
    assert not reader.has_any(["b"])
    writer.add(["b"])
    assert reader.has_any(["a"])
    assert reader.has_any(["b"])
