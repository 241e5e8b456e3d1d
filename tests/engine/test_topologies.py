"""One logical stack over tensor parallel, pipeline parallel and data parallel engines."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from patcher.client import Engine
from patcher.errors import BaseMismatchError, GuardBreachedError, StackChangedError
from patcher.patch import Patch
from patcher.protocol import Change
from tests.conftest import REPOSITORY
from tests.engine.conftest import EAGER, answers
from tests.engine.patches import merge, module_name, random_patch, weights
from tests.engine.server import Server, serving
from tests.engine.tiny import LAYERS, tiny_llama

pytestmark = pytest.mark.engine

TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
# A prefix of several of the prefix cache's blocks, which are 128 tokens on CPU.
PREFIX = (REPOSITORY / "tests" / "data" / "ppl.txt").read_text()[:1200]
ENDS = ("The capital of France is", "In the year 1914", "She opened the door and")
PROMPTS = [f"{PREFIX}\n\n{end}" for end in ENDS]
FIRST, LAST = 0, LAYERS - 1  # the layers of the first and of the last pipeline stage


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def patch(model: Path) -> Patch:
    return random_patch(model, 1, layers=(FIRST, LAST), scale=20.0)


@pytest.fixture(scope="module")
def merged(model: Path, patch: Patch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(model, [patch], tmp_path_factory.mktemp("merged") / "model")


def elsewhere(model: Path, layer: int, columns: slice) -> Patch:
    """A patch whose base differs from the served one in some columns of one layer."""
    held = weights(model)
    held[f"{module_name(layer)}.weight"][:, columns] += 1
    return random_patch(model, 2, layers=(FIRST, LAST), base=held)


def live_modules(engine: Engine) -> dict[tuple[int, int], set[str]]:
    """The modules that each rank of each engine holds a part of."""
    verdict = engine.verify()
    assert verdict["ok"]
    return {(r["engine"], r["rank"]): set(r["modules"]) for r in verdict["ranks"]}


# -- several ranks in one engine -----------------------------------------------------------------


@dataclass
class Divided:
    """An engine of two ranks, and what one says that was started on the merged checkpoint."""

    name: str
    server: Server
    merged: list[object]


@pytest.fixture(scope="module", params=["tensor", "pipeline"])
def divided(
    request: pytest.FixtureRequest,
    model: Path,
    merged: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Divided]:
    # vLLM 0.32 on CPU makes the buffers between stages in the warm-up, which eager mode lacks.
    options = [f"--{request.param}-parallel-size", "2"]
    options += [EAGER] if request.param == "tensor" else []
    folder = tmp_path_factory.mktemp(request.param)
    environment = {**TWO_CORES, "VLLM_CACHE_ROOT": str(folder / "compiled")}
    reference = Server(merged, folder / "merged", *options, environment=environment)
    with serving(reference):
        said = answers(reference, PROMPTS)
    with serving(Server(model, folder / "server", *options, environment=environment)) as server:
        yield Divided(request.param, server, said)


def test_two_ranks_answer_as_the_merged_checkpoint_does(divided: Divided, patch: Patch) -> None:
    base = answers(divided.server, PROMPTS)
    with Engine(divided.server.url, divided.server.token) as engine:
        engine.apply(patch)
        assert answers(divided.server, PROMPTS) == divided.merged
        both = {module_name(FIRST), module_name(LAST)}
        parts = {"tensor": (both, both), "pipeline": ({module_name(FIRST)}, {module_name(LAST)})}
        first, second = parts[divided.name]
        assert live_modules(engine) == {(0, 0): first, (0, 1): second}
        assert [one["rank"] for one in engine.status()["processes"]] == [0, 1]
        engine.revert(all=True)
    assert answers(divided.server, PROMPTS) == base
    assert base != divided.merged


def test_what_the_second_rank_refuses_changes_nothing_on_the_first(
    divided: Divided, model: Path
) -> None:
    width = weights(model)[f"{module_name(LAST)}.weight"].shape[1]
    foreign = elsewhere(model, LAST, slice(width // 2, None))
    base = answers(divided.server, PROMPTS)
    with Engine(divided.server.url, divided.server.token) as engine:
        with pytest.raises(BaseMismatchError, match="Rank 1: "):
            engine.apply(foreign)
        assert engine.status()["stack"] == []
        assert live_modules(engine).keys() == {(0, 0), (0, 1)}
    assert answers(divided.server, PROMPTS) == base


def test_two_ranks_say_what_one_process_computes(
    divided: Divided, model: Path, merged: Path, patch: Patch
) -> None:
    exact, rounded, base = (
        _first_token(merged, torch.float32),
        _first_token(merged, torch.bfloat16),
        _first_token(model, torch.float32),
    )
    with Engine(divided.server.url, divided.server.token) as engine:
        engine.apply(patch)
        told = [divided.server.complete(prompt, 1)["logprobs"] for prompt in PROMPTS]
        engine.revert(all=True)
    served = torch.tensor([one["token_logprobs"][0] for one in told])
    # Two ranks round elsewhere than one process does, by about as much as bf16 rounds at all.
    tolerance = 2 * (rounded - exact).abs().max()
    assert (served - exact.amax(-1)).abs().max() <= tolerance
    assert (base.amax(-1) - exact.amax(-1)).abs().max() > 2 * tolerance


def _first_token(model: Path, dtype: torch.dtype) -> torch.Tensor:
    """Log-probabilities ``[prompts, vocabulary]`` of what comes first, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    with torch.no_grad():
        batches = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
        logits = torch.stack([reference(ids).logits[0, -1].float() for ids in batches])
    return logits.log_softmax(-1)


# -- several engines -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replicas(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two data-parallel engines behind two API servers that share one port."""
    options = ["--data-parallel-size", "2", "--api-server-count", "2", EAGER]
    server = Server(model, tmp_path_factory.mktemp("dp"), *options, environment=TWO_CORES)
    with serving(server):
        yield server


@pytest.fixture(scope="module")
def one_merged(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """What one engine on one core says that was started on the merged checkpoint."""
    one_core = {"VLLM_CPU_OMP_THREADS_BIND": "0"}
    server = Server(merged, tmp_path_factory.mktemp("one"), EAGER, environment=one_core)
    with serving(server):
        return answers(server, PROMPTS)


def everywhere(server: Server) -> list[list[object]]:
    """The answers of each of the two engines, asked by its number."""
    return [answers(server, PROMPTS, on=number) for number in (0, 1)]


def test_every_engine_changes_and_none_drops_a_stream(
    replicas: Server, patch: Patch, one_merged: list[object]
) -> None:
    base = everywhere(replicas)
    assert base[0] == base[1]
    with ThreadPoolExecutor(4) as pool, Engine(replicas.url, replicas.token) as engine:
        begun = threading.Semaphore(0)
        streams = [pool.submit(_stream, replicas, begun, on) for on in (0, 1, 0, 1)]
        for _ in streams:
            begun.acquire()
        engine.apply(patch)
        assert [stream.result() for stream in streams] == ["length"] * 4
        assert everywhere(replicas) == [one_merged, one_merged]
        both = {module_name(FIRST), module_name(LAST)}
        assert live_modules(engine) == {(0, 0): both, (1, 0): both}
        assert [one["engine"] for one in engine.status()["processes"]] == [0, 1]
        engine.revert(all=True)
    assert everywhere(replicas) == base
    assert base[0] != one_merged


def _stream(server: Server, begun: threading.Semaphore, on: int) -> str:
    """Stream 400 tokens from engine ``on``; why it ended."""
    ended = None
    for number, event in enumerate(server.stream("Once upon a time", 400, on=on)):
        ended = event["choices"][0]["finish_reason"]
        if number == 0:
            begun.release()
    return str(ended)


def test_of_changes_at_once_through_all_api_servers_one_wins(replicas: Server, model: Path) -> None:
    wishes = [random_patch(model, seed, layers=(FIRST,), scale=20.0) for seed in range(10, 16)]
    with Engine(replicas.url, replicas.token) as engine:
        for wish in wishes:
            engine.upload(wish)
        version = engine.status()["weight_version"]
        with ThreadPoolExecutor(len(wishes)) as pool:
            ended = list(
                pool.map(_put, itertools.repeat(replicas), wishes, itertools.repeat(version))
            )
        won = [one for one in ended if not isinstance(one, StackChangedError)]
        assert len(won) == 1
        told = {"stack": won[0]["stack"], "weight_version": won[0]["weight_version"]}
        lost = [one for one in ended if isinstance(one, StackChangedError)]
        assert all(one.details.items() >= told.items() for one in lost)
        status = engine.status()
        assert status["stack"] == told["stack"]
        assert status["weight_version"] == status["engine"]["weight_version"]
        live_modules(engine)
        engine.revert(all=True)


def _put(server: Server, patch: Patch, version: str) -> Change | StackChangedError:
    # A connection of its own: the kernel gives it to one of the API servers.
    with Engine(server.url, server.token) as engine:
        try:
            return engine.set_stack([patch.id], expect=version)
        except StackChangedError as error:
            return error


def test_a_restart_brings_the_stack_back_on_every_engine(
    replicas: Server, patch: Patch, one_merged: list[object]
) -> None:
    with Engine(replicas.url, replicas.token) as engine:
        engine.apply(patch)
        replicas.kill()
        replicas.start()
        assert engine.status()["stack"] == [patch.id]
        live_modules(engine)
        assert everywhere(replicas) == [one_merged, one_merged]
        engine.revert(all=True)


def test_guards_ask_every_engine(replicas: Server, model: Path, patch: Patch) -> None:
    guard = {"prompt": PROMPTS[0], "must_not_contain": "zyzzyva", "tokens": 5}
    with Engine(replicas.url, replicas.token) as engine:
        before = _ended(replicas)
        change = engine.apply(patch, guards=[guard, {"text": PROMPTS[1], "max_loss": 100.0}])
        assert [row["ok"] for row in change["guards"]] == [True, True]
        wanted = {e: n + 2 for e, n in before.items()}
        deadline = time.monotonic() + 30  # vLLM counts a moment after it answers
        while _ended(replicas) != wanted and time.monotonic() < deadline:
            time.sleep(0.1)
        assert _ended(replicas) == wanted
        with pytest.raises(GuardBreachedError):
            engine.apply(
                random_patch(model, 7, layers=(FIRST,)),
                guards={"text": PROMPTS[1], "max_loss": 0.001},
            )
        assert engine.status()["stack"] == [patch.id]
        live_modules(engine)
        engine.revert(all=True)


def _ended(server: Server) -> dict[str, float]:
    """How many requests each engine has answered, as vLLM counts them."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    counts: dict[str, float] = {"0": 0, "1": 0}
    for line in text.splitlines():
        if found := re.match(r'vllm:request_success_total\{.*engine="(\d)".*\} (\S+)', line):
            counts[found[1]] += float(found[2])
    return counts
