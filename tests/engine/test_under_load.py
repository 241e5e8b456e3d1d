"""Requests that cross a change: what they and those after them get, and what they are told."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from patcher.client import Engine
from patcher.engine.stack import Stack
from patcher.patch import Patch
from tests.engine.conftest import EAGER, STAMPED, answers, emptied
from tests.engine.patches import merge, random_patch
from tests.engine.server import Server, serving
from tests.engine.tiny import tiny_llama

pytestmark = pytest.mark.engine

PREFIX = [20 + 7 * i % 350 for i in range(200)]  # tokens that requests share: twelve full blocks
LONGEST = 7900  # tokens: more than flow before the test is done with a stream
AFTER = 500  # tokens that a stream goes on for after the change: some blocks on any platform
BASE = Stack().version


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def patch(tiny: Path) -> Patch:
    return random_patch(tiny, 1, (0, 1), scale=20.0)


@pytest.fixture(scope="module")
def busy(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(Server(tiny, tmp_path_factory.mktemp("busy"), EAGER)) as started:
        yield started


@pytest.fixture
def operator(busy: Server, patch: Patch) -> Iterator[Engine]:
    with emptied(busy) as client:
        client.upload(patch)  # so that a change is quick
        yield client


def post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    answer = httpx.post(f"{server.url}{path}", json={"model": "m", **body}, timeout=120)
    answer.raise_for_status()
    return answer


def generated(server: Server) -> float:
    """How many tokens the engine made so far."""
    # Not httpx: what a client of it computes first can take seconds beside an engine on two cores.
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:generation_tokens_total"))


class Streaming(threading.Thread):
    """A long streamed completion: its tokens, its headers, and the comments between."""

    def __init__(self, server: Server, prompt: list[int]) -> None:
        super().__init__()
        self.server, self.prompt = server, prompt
        self.flows = threading.Event()
        self.enough = 0  # the number of tokens after which it hangs up,
        self.after_comment = False  # from the first comment on
        self.tokens: list[int] = []
        self.comments: list[tuple[int, str]] = []  # after so many tokens
        self.headers = httpx.Headers()
        self.ended: str | None = None

    def run(self) -> None:
        body = {"model": "m", "prompt": self.prompt, "max_tokens": LONGEST, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        url = f"{self.server.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=120) as answer:
            self.headers = answer.headers
            for line in answer.iter_lines():
                if line.startswith(":"):
                    self.comments.append((len(self.tokens), line))
                elif line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    self.tokens += choice["token_ids"]
                    self.ended = choice["finish_reason"]
                    if len(self.tokens) >= 20:
                        self.flows.set()
                    if 0 < self.enough <= len(self.tokens) - self._from():
                        return

    def _from(self) -> int:
        if not self.after_comment:
            return 0
        return self.comments[0][0] if self.comments else LONGEST

    def begin(self) -> None:
        self.start()
        assert self.flows.wait(60)

    def finish(self, more: int, *, after_comment: bool = False) -> None:
        """Hang up ``more`` tokens from now, or from the first comment; it may end before.

        A reader that gets no core beside the engine can be any number of tokens behind it.
        """
        self.after_comment = after_comment
        self.enough = more if after_comment else len(self.tokens) + more
        self.join(120)
        wanted = min(self.enough + self._from(), LONGEST)
        assert len(self.tokens) >= wanted, f"it ended early: {self.ended}"


def test_continue_neither_stalls_a_stream_nor_lets_its_kv_be_used_again(
    busy: Server, operator: Engine, patch: Patch, tiny: Path, tmp_path: Path
) -> None:
    stream = Streaming(busy, PREFIX)
    stream.begin()
    change = operator.apply(patch, in_flight="continue")
    at_change = len(stream.tokens)
    # While the stream holds its blocks, another request shares its prefix: computed anew.
    busy.complete([*PREFIX, 7], 2)
    stream.finish(AFTER)
    assert change["mixed"] == 1
    # Same prefix; an extension of what the stream said before the change; and of all that it said.
    prompts = [[*PREFIX, 5], PREFIX + stream.tokens[:at_change], PREFIX + stream.tokens]
    after = ask(busy, prompts)
    checkpoint = merge(tiny, [patch], tmp_path / "model")
    with serving(Server(checkpoint, tmp_path / "merged", EAGER)) as merged:
        merged.complete([*PREFIX, 7], 2)
        assert ask(merged, prompts) == after
    operator.revert(all=True)
    assert ask(busy, prompts) != after, "the patch must change what is said"


def ask(server: Server, prompts: list[list[int]]) -> list[object]:
    return answers(server, prompts, 24)  # type: ignore[arg-type]


@STAMPED
def test_a_stream_that_continues_says_since_when_and_that_it_is_mixed(
    busy: Server, operator: Engine, patch: Patch
) -> None:
    stream = Streaming(busy, PREFIX)
    stream.begin()
    version = operator.apply(patch, in_flight="continue")["weight_version"]
    stream.finish(AFTER, after_comment=True)
    assert stream.headers["x-patcher-weight-version"] == BASE
    assert stream.headers["x-patcher-weight-version-since"] == "0"
    assert "x-patcher-mixed" not in stream.headers
    ((_, comment),) = stream.comments
    words = comment.removeprefix(": patcher ").split()
    assert words[0] == f"weight-version={version}"
    assert 20 <= int(words[1].removeprefix("since-token=")) < len(stream.tokens)
    assert words[2] == "mixed"


@STAMPED
def test_an_answer_across_a_change_lists_every_version(
    busy: Server, operator: Engine, patch: Patch
) -> None:
    before, answer = generated(busy), []  # type: float, list[httpx.Response]
    body = {"prompt": PREFIX, "max_tokens": 3000, "ignore_eos": True}
    one = threading.Thread(target=lambda: answer.append(post(busy, "/v1/completions", body)))
    one.start()
    while generated(busy) == before:
        time.sleep(0.01)
    version = operator.apply(patch)["weight_version"]
    one.join(120)
    assert answer[0].headers["x-patcher-weight-version"] == f"{BASE}, {version}"
    first, then = map(int, answer[0].headers["x-patcher-weight-version-since"].split(", "))
    assert 0 == first < then < 3000
    assert "x-patcher-mixed" not in answer[0].headers, "it was recomputed"


@STAMPED
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "One", "max_tokens": 4}),
        ("/v1/completions", {"prompt": ["One", "Two"], "max_tokens": 4, "n": 2}),
        ("/v1/completions", {"prompt": "One", "max_tokens": 4, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True}),
        ("/v1/responses", {"input": "One", "max_output_tokens": 4}),
        ("/v1/responses", {"input": "One", "max_output_tokens": 4, "stream": True}),
    ],
)
def test_every_route_tells_the_version_in_force(
    busy: Server, operator: Engine, patch: Patch, path: str, body: dict[str, Any]
) -> None:
    body = {"max_tokens": 4, **body} if "chat" in path else body
    assert told(post(busy, path, body)) == BASE
    version = operator.apply(patch)["weight_version"]
    assert told(post(busy, path, body)) == version


def told(answer: httpx.Response) -> str:
    """The version in the head; of a stream that begins before its first token in a comment."""
    comments = [x for x in answer.text.splitlines() if x.startswith(": patcher weight-version=")]
    by_comment = "".join(comments).partition("=")[2].partition(" ")[0]
    return str(answer.headers.get("x-patcher-weight-version") or by_comment)


def test_what_asks_nothing_of_the_weights_tells_no_version(busy: Server) -> None:
    assert "x-patcher-weight-version" not in httpx.get(f"{busy.url}/v1/models").headers
