"""Guards: a change that breaks one is taken back by itself, and the ledger tells.

The first half plays vLLM's answers, for those that a real one can't be made to give; the
second half asks a real engine.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from patcher.client import Engine
from patcher.engine import guards as guards_module
from patcher.engine import vllm_client, vllm_generation
from patcher.engine.outcome import Outcome
from patcher.engine.service import PatchService
from patcher.engine.stack import Stack
from patcher.engine.store import Store
from patcher.errors import EngineRefusedError, GuardBreachedError, InputError, UsageError
from patcher.guards import Guard
from patcher.patch import Patch
from tests.engine.conftest import answers
from tests.engine.fake_vllm import FakeClient
from tests.engine.server import Server
from tests.engine.test_faults import RANKS, folded, make, run, same

SECRET = "the-secret-of-the-forget-set"


class Speaker:
    """Plays what the engine says: one thing with the base weights, another with others."""

    def __init__(self, client: FakeClient, base: list[torch.Tensor]) -> None:
        self.client = client
        self.base = base
        self.text = ("It is Paris.", "It is Rome.")
        self.nats = ([-1.0], [-2.0])  # of each token, by engine
        self.engines: list[int | None] = [None]
        self.fails: Exception | None = None
        self.hangs = False
        self.asked: list[bool] = []  # whether each question met the base
        self.running = self.most = 0

    async def answer(self) -> bool:
        plain = same(self.client.live(), self.base)
        self.asked.append(plain)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0)
            if self.fails:
                raise self.fails
            if self.hangs:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.client.log.append("aborted")
            raise
        finally:
            self.running -= 1
        return plain

    async def continuation(self, client: Any, ids: Any, tokens: int, engine: Any) -> str:
        return self.text[0 if await self.answer() else 1]

    async def log_probabilities(
        self, client: Any, ids: Any, first: int, engine: int | None
    ) -> list[float]:
        nats = self.nats[0 if await self.answer() else 1]
        return [nats[(engine or 0) % len(nats)]] * (len(ids) - first)


@pytest.fixture
def speaker(weights: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Speaker:
    speaker = Speaker(FakeClient(weights, RANKS), weights)

    async def encode(client: Any, text: str, *, special: bool = True) -> list[int]:
        return [ord(one) for one in text]

    monkeypatch.setattr(vllm_client, "describe", lambda client: {})
    monkeypatch.setattr(vllm_generation, "can_answer", lambda client: True)
    monkeypatch.setattr(vllm_generation, "encode", encode)
    monkeypatch.setattr(vllm_generation, "most_tokens", lambda client: 100)
    monkeypatch.setattr(vllm_generation, "gives_log_probabilities", lambda client: True)
    monkeypatch.setattr(vllm_generation, "engines", lambda client: speaker.engines)
    monkeypatch.setattr(vllm_generation, "continuation", speaker.continuation)
    monkeypatch.setattr(vllm_generation, "log_probabilities", speaker.log_probabilities)
    return speaker


@pytest.fixture
def service(speaker: Speaker, tmp_path: Path) -> PatchService:
    return PatchService(speaker.client, Store(tmp_path / "state"))


def put(service: PatchService, patches: list[Patch], *guards: dict[str, Any]) -> Outcome:
    for patch in patches:
        service.store.add_patch(patch, "me")
    return run(
        service.change(
            [p.id for p in patches],
            if_match=service.store.in_force().version,
            in_flight="recompute",
            actor="me",
            guards=[Guard(**one) for one in guards],
        )
    )


def events(service: PatchService) -> list[str]:
    return [e["event"] for e in service.store.ledger() if e["event"].startswith("change-")]


HOLDS: list[dict[str, Any]] = [
    {"prompt": "p", "must_contain": "rome"},
    {"prompt": "p", "must_start_with": "It is R"},
    {"prompt": "p", "must_not_contain": "Paris"},
    {"prompt": "p", "must_not_contain": "Rom"},  # words of their own count, not parts
    {"prompt": "p", "target": "x", "max_probability": math.exp(-4) * 1.001},  # " x" is two tokens
    {"prompt": "p ", "target": "x", "min_probability": math.exp(-2) * 0.999},
    {"text": "ab", "max_loss": 2.001},
    {"text": "ab", "max_ratio": math.e * 1.001},
]
BREAKS: list[dict[str, Any]] = [
    {"prompt": "p", "must_contain": "Paris"},
    {"prompt": "p", "must_start_with": "is"},
    {"prompt": "p", "must_not_contain": "rome"},
    {"prompt": "p", "target": "x", "max_probability": math.exp(-4) * 0.999},
    {"prompt": "p ", "target": "x", "min_probability": math.exp(-2) * 1.001},
    {"text": "ab", "max_loss": 1.999},
    {"text": "ab", "max_ratio": math.e * 0.999},
]


def test_guards_that_hold_are_told(
    service: PatchService, speaker: Speaker, weights: list[torch.Tensor]
) -> None:
    patch = make(weights, 1)
    outcome = put(service, [patch], *HOLDS)
    assert same(speaker.client.live(), folded(weights, patch))
    assert [row["ok"] for row in outcome.as_dict()["guards"]] == [True] * len(HOLDS)
    assert [row["guard"] for row in outcome.guards][:2] == ["guard 1", "guard 2"]
    done = service.store.ledger()[-1]
    assert done["event"] == "change-done"
    assert done["detail"]["guards"] == list(outcome.guards)
    assert speaker.asked == [True] + [False] * len(HOLDS), "only the ratio is measured before"


@pytest.mark.parametrize("guard", BREAKS, ids=lambda guard: list(guard)[-1])
def test_a_breach_puts_the_stack_before_back(
    service: PatchService, speaker: Speaker, weights: list[torch.Tensor], guard: dict[str, Any]
) -> None:
    speaker.base = folded(weights, first := make(weights, 2))
    put(service, [first])
    speaker.client.log.clear()
    with pytest.raises(GuardBreachedError, match="'the name'") as caught:
        put(service, [first, make(weights, 1)], HOLDS[0], {**guard, "name": "the name"})
    assert same(speaker.client.live(), speaker.base)
    assert speaker.client.log[-4:] == ["pause keep", "roll_back", "flush", "resume"]
    assert speaker.client.version == Stack((first.id,)).version
    assert service.store.committed() == Stack((first.id,))
    assert run(service.verify())["ok"]
    good, bad = caught.value.results
    assert good["ok"]
    assert not bad["ok"]
    failed = service.store.ledger()[-1]
    assert failed["event"] == "change-failed"
    assert failed["detail"]["cause"] == "guard-breached"
    assert failed["detail"]["guards"] == [good, bad]


def test_nothing_of_a_guard_is_in_the_ledger_or_the_error(
    service: PatchService, weights: list[torch.Tensor]
) -> None:
    guards = [
        {"prompt": SECRET, "must_contain": SECRET},
        {"prompt": SECRET, "target": SECRET, "min_probability": 1.0},
        {"text": SECRET, "max_loss": 0.1},
    ]
    with pytest.raises(GuardBreachedError) as caught:
        put(service, [make(weights, 1)], *guards)
    told = json.dumps([str(caught.value), caught.value.results, service.store.ledger()])
    assert SECRET not in told


def test_a_guard_that_gets_no_answer_is_a_breach(
    service: PatchService, speaker: Speaker, weights: list[torch.Tensor]
) -> None:
    speaker.fails = RuntimeError(SECRET)
    with pytest.raises(GuardBreachedError, match="RuntimeError") as caught:
        put(service, [make(weights, 1)], HOLDS[0])
    assert caught.value.results[0]["value"] is None
    assert SECRET not in str(caught.value)
    assert same(speaker.client.live(), weights)


def test_a_guard_that_takes_too_long_is_a_breach_and_ends(
    service: PatchService,
    speaker: Speaker,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guards_module, "DEADLINE", 0.05)
    speaker.hangs = True
    with pytest.raises(GuardBreachedError, match="no answer within"):
        put(service, [make(weights, 1)], *HOLDS[:2])
    assert same(speaker.client.live(), weights)
    assert not speaker.client.stopped
    log = speaker.client.log
    assert log.count("aborted") == 2
    assert log.index("roll_back") > log.index("aborted") + 1, "before the weights go back"
    assert events(service) == ["change-intent", "change-failed"]


@pytest.mark.parametrize("loss", [math.nan, -math.inf])
def test_a_loss_that_is_no_number_is_a_breach(
    service: PatchService, speaker: Speaker, weights: list[torch.Tensor], loss: float
) -> None:
    speaker.nats = ([-1.0], [loss])
    with pytest.raises(GuardBreachedError, match="not a finite number") as caught:
        put(service, [make(weights, 1)], {"text": "ab", "max_loss": 9.0, "max_ratio": 9.0})
    assert [row["value"] for row in caught.value.results] == [None, None]


def test_the_worst_engine_counts(
    service: PatchService, speaker: Speaker, weights: list[torch.Tensor]
) -> None:
    speaker.engines = [0, 1, 2]
    speaker.nats = ([-1.0], [-2.0, -3.0, -1.0])
    outcome = put(service, [make(weights, 1)], {"text": "ab", "max_loss": 3.5})
    assert [(row["value"], row["engine"]) for row in outcome.guards] == [(3.0, 1)]
    guard = {"prompt": "p ", "target": "x", "min_probability": math.exp(-2.5)}
    with pytest.raises(GuardBreachedError) as caught:
        put(service, [make(weights, 2)], guard)
    assert [row["engine"] for row in caught.value.results] == [1]


def test_guards_do_not_crowd_out_the_served(
    service: PatchService, speaker: Speaker, weights: list[torch.Tensor]
) -> None:
    put(service, [make(weights, 1)], *HOLDS[:1] * 40)
    assert speaker.most == guards_module.CONCURRENCY


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        ({"prompt": "p" * 90, "must_contain": "x"}, "too long"),
        ({"text": "p" * 100, "max_loss": 1.0}, "too long"),
        ({"text": "p", "max_loss": 1.0}, "too few tokens"),
    ],
)
def test_a_guard_that_cannot_be_asked_is_refused_before_anything_changes(
    service: PatchService, speaker: Speaker, weights: list[torch.Tensor], guard: Any, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        put(service, [make(weights, 1)], guard)
    assert speaker.client.log == ["probe"]
    assert events(service) == []


def test_what_can_not_be_measured_before_is_refused_before_anything_changes(
    service: PatchService,
    speaker: Speaker,
    weights: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speaker.fails = RuntimeError()
    with pytest.raises(EngineRefusedError, match="before the change"):
        put(service, [make(weights, 1)], {"text": "ab", "max_ratio": 1.1})
    speaker.fails = None
    speaker.client.stopped = True
    with pytest.raises(EngineRefusedError, match="paused"):
        put(service, [make(weights, 1)], HOLDS[0])
    speaker.client.stopped = False
    monkeypatch.setattr(vllm_generation, "gives_log_probabilities", lambda client: False)
    with pytest.raises(EngineRefusedError, match="logits"):
        put(service, [make(weights, 1)], HOLDS[-1])
    assert events(service) == []
    assert same(speaker.client.live(), weights)


def test_a_revert_may_be_guarded_too(
    service: PatchService, speaker: Speaker, weights: list[torch.Tensor]
) -> None:
    patch = make(weights, 1)
    put(service, [patch])
    with pytest.raises(GuardBreachedError):
        put(service, [], {"prompt": "p", "must_not_contain": "Paris"})
    assert same(speaker.client.live(), folded(weights, patch))


def test_a_retry_of_what_is_in_force_asks_nothing(
    service: PatchService, speaker: Speaker, weights: list[torch.Tensor]
) -> None:
    patch = make(weights, 1)
    put(service, [patch])
    assert put(service, [patch], BREAKS[0]).guards == ()
    assert speaker.asked == []


# -- on a real engine --------------------------------------------------------------------------

PROMPT = "The capital of France is"
TEXT = "The town lies on the river, and its people have fished there for hundreds of years."


@contextmanager
def flowing(server: Server) -> Iterator[None]:
    """A stream that is open at the start, and must come to its end."""
    said: list[dict[str, Any]] = []
    begun = threading.Event()

    def read() -> None:
        for event in server.stream("Once upon a time", 400):
            said.append(event)
            begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    yield
    reader.join(120)
    assert not reader.is_alive()
    assert said[-1]["choices"][0]["finish_reason"] == "length", "the stream was dropped"


@pytest.mark.engine
@pytest.mark.model
def test_real_guards_measure_what_the_engine_serves(
    server: Server, engine: Engine, patch_a: Patch
) -> None:
    before = _nats(server, TEXT)
    generous = [
        {"name": "loss", "text": TEXT, "max_loss": 50.0, "max_ratio": 1e6},
        {"name": "said", "prompt": PROMPT, "must_not_contain": "zyzzyva", "tokens": 4},
        {"name": "likely", "prompt": PROMPT, "target": "Paris", "max_probability": 1.0},
        {
            "name": "chat",
            "messages": [{"role": "user", "content": "Say hello."}],
            "must_not_contain": "zyzzyva",
            "target": "Hello",
            "min_probability": 0.0,
        },
    ]
    change = engine.apply(patch_a, guards=generous)
    found = {(row["guard"], row["bound"]): row for row in change["guards"]}
    assert len(found) == 6
    assert all(row["ok"] for row in found.values())
    after = _nats(server, TEXT)
    assert found["loss", "max_loss"]["value"] == pytest.approx(_mean(after), rel=1e-3)
    assert found["loss", "max_ratio"]["value"] == pytest.approx(
        math.exp(_mean(after) - _mean(before)), rel=1e-3
    )
    likely = math.exp(sum(_nats(server, f"{PROMPT} Paris")[len(_nats(server, PROMPT)) :]))
    assert found["likely", "max_probability"]["value"] == pytest.approx(likely, rel=1e-3)
    done = [e for e in engine.ledger() if e["event"] == "change-done"][-1]
    assert done["detail"]["guards"] == change["guards"]


@pytest.mark.engine
@pytest.mark.model
def test_a_real_breach_leaves_the_answers_as_they_were(
    server: Server,
    engine: Engine,
    patch_a: Patch,
    loud: Patch,
    prompts: list[str],
) -> None:
    engine.apply(patch_a)
    says = server.complete(PROMPT, 8)["text"]
    before = answers(server, prompts, 16)
    guards = [
        {"name": "stays", "prompt": PROMPT, "must_start_with": says, "tokens": 8},
        {"name": "quality", "text": TEXT, "max_ratio": 1.05},
    ]
    with flowing(server), pytest.raises(GuardBreachedError) as caught:
        engine.apply(loud, guards=guards, reason="too loud")
    assert [(row["guard"], row["ok"]) for row in caught.value.results] == [
        ("stays", False),
        ("quality", False),
    ]
    assert engine.status()["stack"] == [patch_a.id]
    assert engine.status()["engine"]["state"] == "ready"
    assert engine.verify()["ok"]
    assert answers(server, prompts, 16) == before
    failed = engine.ledger()[-1]
    assert failed["event"] == "change-failed"
    assert failed["detail"]["guards"] == caught.value.results
    with pytest.raises(InputError, match="8192 tokens at most"):
        engine.apply(loud, guards={"text": "word " * 9000, "max_loss": 9.0})
    with pytest.raises(UsageError, match=r"guards\.0"):
        _send(server, engine, {"guards": [{"prompt": "p"}]})


def _nats(server: Server, text: str) -> list[float]:
    """Each token's log-probability but the first's, by vLLM's own route."""
    places = server.complete(text, 1, prompt_logprobs=0)["prompt_logprobs"][1:]
    return [next(iter(place.values()))["logprob"] for place in places]


def _mean(nats: list[float]) -> float:
    return -sum(nats) / len(nats)


def _send(server: Server, engine: Engine, more: dict[str, Any]) -> None:
    """A body that our own client would not send."""
    engine._call("PUT", "stack", (), headers={"If-Match": '"0"'}, json={"stack": [], **more})
