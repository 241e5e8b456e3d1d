"""A served model under load, for bench/soak.py and bench/spacing.py: server, patches, requests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors import safe_open

from patcher.patch import Base, Delta, Manifest, Method, Patch, Requests, module_base

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / ".models" / "smollm2-135m-instruct"
TEXT = REPOSITORY / "tests" / "data" / "ppl.txt"
START_S = 400


class Server:
    """`patcher serve` in a process group of its own."""

    def __init__(self, model: Path, folder: Path, *options: str, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.log, self.state = folder / "server.log", folder / "state"
        words = ["serve", str(model), "--state", str(self.state), "--host", "127.0.0.1"]
        words += ["--port", self.url.rpartition(":")[2], "--served-model-name", "m"]
        words += ["--max-model-len", "4096", "--enforce-eager", *options]
        settings = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **environment}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "patcher", *words],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **settings},
                start_new_session=True,
            )

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            time.sleep(0.25)
        raise SystemExit(f"the server did not start:\n{self.log.read_text()[-3000:]}")

    @property
    def token(self) -> str:
        return (self.state / "token").read_text().strip()

    def stop(self) -> None:
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
                return


@contextlib.contextmanager
def serving(model: Path, folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    server = Server(model, folder, *options, **environment)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def random_patches(model: Path, count: int, seed: int, scale: float = 8.0) -> list[Patch]:
    """Edits without meaning that change what is said, each on two neighbouring layers."""
    draw = np.random.default_rng(seed)
    layers = layer_count(model)
    return [
        random_patch(
            model,
            {(2 * number) % layers, (2 * number + 1) % layers},
            draw,
            title=f"random edit {number}",
            scale=scale,
        )
        for number in range(count)
    ]


def random_patch(
    model: Path,
    layers: Iterable[int],
    draw: np.random.Generator,
    *,
    title: str = "random edit",
    rank: int = 4,
    scale: float = 8.0,
) -> Patch:
    """An edit without meaning on the down projections of ``layers``."""
    modules, deltas = {}, {}
    with safe_open(model / "model.safetensors", "pt") as held:
        for layer in layers:
            name = f"model.layers.{layer}.mlp.down_proj"
            weight = held.get_tensor(f"{name}.weight")
            d_out = weight.shape[0]
            left = draw.standard_normal((d_out, rank)).astype(np.float32)
            right = (draw.standard_normal((rank, d_out)) * scale / d_out).astype(np.float32)
            modules[name] = module_base(weight)
            deltas[name] = Delta.multiplicative(left, right)
    manifest = Manifest(
        title=title,
        created="2026-11-24T00:00:00Z",
        tool="bench",
        base=Base(model="m", architecture="LlamaForCausalLM", modules=modules),
        method=Method(name="random", hyperparameters={"rank": rank}),
        requests=Requests(count=1, commitment="0" * 64),
    )
    return Patch.build(manifest, deltas)


def layer_count(model: Path) -> int:
    with safe_open(model / "model.safetensors", "pt") as held:
        names = held.keys()
    return sum(name.endswith("mlp.down_proj.weight") for name in names)


def tokenised(client: httpx.Client, text: str) -> list[int]:
    answer = client.post("/tokenize", json={"model": "m", "prompt": text})
    answer.raise_for_status()
    return list(answer.json()["tokens"])


@dataclass
class Answer:
    """What a request got. ``spans``: each weight version with its first output token."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    spans: list[tuple[str, int]] = field(default_factory=list)
    mixed: bool = False
    mixed_since_head: bool = False  # told before the first token, or with all of them
    ended: str | None = None
    times: list[float] = field(default_factory=list)  # of each piece of a stream


def ask(client: httpx.Client, prompt: Sequence[int], tokens: int, *, stream: bool) -> Answer:
    """A greedy completion of exactly ``tokens`` tokens.

    Raises :class:`httpx.HTTPError`, or :class:`ValueError` where a stream isn't whole.
    """
    body: dict[str, Any] = {"model": "m", "prompt": list(prompt), "max_tokens": tokens}
    body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "stream": stream}
    answer = Answer(list(prompt))
    with client.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            response.read()
        response.raise_for_status()
        _read_head(answer, response.headers)
        if stream:
            _read_stream(answer, response)
        else:
            choice = json.loads(response.read())["choices"][0]
            answer.tokens, answer.ended = choice["token_ids"], choice["finish_reason"]
    return answer


def _read_head(answer: Answer, headers: httpx.Headers) -> None:
    versions = headers["x-patcher-weight-version"].split(", ")
    since = map(int, headers["x-patcher-weight-version-since"].split(", "))
    answer.spans = list(zip(versions, since, strict=True))
    answer.mixed = answer.mixed_since_head = "x-patcher-mixed" in headers


def _read_stream(answer: Answer, response: httpx.Response) -> None:
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith(": patcher "):
            words = line.split()
            version, since = (word.partition("=")[2] for word in words[2:4])
            answer.spans.append((version, int(since)))
            answer.mixed |= words[-1] == "mixed"
        elif line.startswith("data: "):
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            answer.times.append(time.monotonic())
            answer.tokens += choice["token_ids"]
            answer.ended = choice["finish_reason"]
    raise ValueError("the stream ended without [DONE]")
