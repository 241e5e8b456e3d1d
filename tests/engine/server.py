"""Start a real vLLM server as a user would, and talk to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 400
CONTEXT = 8192  # tokens of a request: all that the model takes
REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A vLLM server in a process group of its own; its log goes to ``folder/server.log``."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        *options: str,
        launcher: Sequence[str] = ("-m", "patcher", "serve"),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.model = str(model)
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.token_file = folder / "state" / "token"
        self._launcher = launcher
        self._options = options
        self._environment = environment or {}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str, wait: bool = True, **environment: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *self._launcher, self.model, "--port", str(self.port)]
        command += ["--host", "127.0.0.1", "--max-model-len", str(CONTEXT)]
        command += ["--served-model-name", "m", *self._options, *more]
        settings = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "PATCHER_STATE": str(self.folder / "state"),
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **settings, **self._environment, **environment},
                start_new_session=True,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            time.sleep(0.25)
        self.stop()
        raise RuntimeError(f"the server did not start:\n{self.log()[-4000:]}")

    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    @property
    def token(self) -> str:
        return self.token_file.read_text().strip()

    def kill(self, sent: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the server and all that it started, and wait for the end."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, sent)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        self.process = None

    def stop(self) -> None:
        self.kill(signal.SIGTERM)

    # -- questions ---------------------------------------------------------------------------

    def complete(
        self, prompt: str | list[int], tokens: int = 8, *, on: int | None = None, **more: Any
    ) -> dict[str, Any]:
        """Greedy completion with log-probabilities: the choice as vLLM returns it.

        ``on``: the data-parallel engine that is to answer.
        """
        body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body |= {"logprobs": 5, **more}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, headers=_to(on), timeout=120)
        answer.raise_for_status()
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice

    def stream(
        self, prompt: str | list[int], tokens: int, *, on: int | None = None, **more: Any
    ) -> Generator[dict[str, Any]]:
        """The events of a streamed greedy completion."""
        body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True, **more}
        with httpx.stream(
            "POST", f"{self.url}/v1/completions", json=body, headers=_to(on), timeout=120
        ) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))
        raise AssertionError("the stream ended without [DONE]")


def _to(engine: int | None) -> dict[str, str]:
    return {} if engine is None else {"X-data-parallel-rank": str(engine)}


@contextlib.contextmanager
def serving(server: Server, *options: str, **environment: str) -> Iterator[Server]:
    """The server, started and stopped."""
    server.start(*options, **environment)
    try:
        yield server
    finally:
        server.stop()
