"""Streaming clients that cost next to nothing: raw sockets and one thread that takes the time.

vLLM's processes spin, so on few cores a client that parses what it gets starves with them and
measures itself. This one reads bytes, and keeps when each event of each stream arrived.
"""

from __future__ import annotations

import json
import random
import selectors
import socket
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from urllib.parse import urlsplit

from report import Spread

_EVENT = b'data: {"id"'  # how vLLM begins each event of a stream; one is one token here
STUCK_S = 240.0
VOCABULARY = 40_000


def random_prompts(streams: int, tokens: int, seed: int) -> list[list[int]]:
    """Prompts that share no prefix, so that nothing comes from the cache by chance."""
    draw = random.Random(seed)
    return [[draw.randrange(1000, VOCABULARY) for _ in range(tokens)] for _ in range(streams)]


class Streams:
    """Greedy completions that stream at once, each until the block ends or its tokens do.

    ``times``: of each stream when each of its events arrived, on the monotonic clock.
    """

    def __init__(self, url: str, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        self.times: list[list[float]] = [[] for _ in prompts]
        self._tails = [b""] * len(prompts)
        self._address = urlsplit(url)
        self._over = False
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self.begun = time.monotonic()
        for number, prompt in enumerate(prompts):
            self._selector.register(self._open(prompt, tokens), selectors.EVENT_READ, number)
        self._thread.start()

    def _open(self, prompt: Sequence[int], tokens: int) -> socket.socket:
        wish = {"model": "m", "prompt": list(prompt), "max_tokens": tokens, "stream": True}
        body = json.dumps({**wish, "temperature": 0, "ignore_eos": True}).encode()
        host = str(self._address.hostname)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        opened = socket.create_connection((host, self._address.port or 80))
        opened.sendall(head.encode() + body)
        opened.setblocking(False)
        return opened

    def _read(self) -> None:
        while not self._over and self._selector.get_map():
            for key, _ in self._selector.select(0.2):
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(1 << 16)
                now = time.monotonic()
                if not data:
                    self._close(key.fileobj)
                    continue
                tail = self._tails[key.data] + data
                self.times[key.data] += [now] * tail.count(_EVENT)
                last = tail.rfind(_EVENT)
                # An event's beginning may be cut in two, and must not count twice.
                self._tails[key.data] = tail[max(last + 1, len(tail) - len(_EVENT) + 1) :]
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            self._close(key.fileobj)

    def _close(self, stream: socket.socket) -> None:
        self._selector.unregister(stream)
        stream.close()

    def __enter__(self) -> Streams:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over = True
        self._thread.join()

    def advance(self, tokens: int) -> None:
        """Wait until every stream has made ``tokens`` more.

        Raises :class:`SystemExit` where one ends before, or nothing comes for long.
        """
        wanted = [len(times) + tokens for times in self.times]
        deadline = time.monotonic() + STUCK_S
        while any(len(t) < n for t, n in zip(self.times, wanted, strict=True)):
            if time.monotonic() > deadline or not self._thread.is_alive():
                raise SystemExit(f"a stream stands still: {[len(t) for t in self.times]} tokens")
            time.sleep(0.01)

    def longest_gap(self, since: float, until: float) -> tuple[float, float]:
        """The longest silence of any stream within the two times, in seconds, and its beginning."""
        gaps = [
            (b - a, a)
            for times in self.times
            for a, b in pairwise(times)
            if b >= since and a < until
        ]
        return max(gaps, default=(0.0, since))

    def made(self, moment: float) -> int:
        """How many tokens all streams had made by then."""
        return sum(bisect_right(times, moment) for times in self.times)

    def step(self, since: float, until: float) -> Spread:
        """Seconds between two events of a stream from ``since`` to ``until``: a decode step."""
        return Spread.of(
            b - a for times in self.times for a, b in pairwise(times) if since <= a and b <= until
        )
