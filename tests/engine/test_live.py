"""Patches on a running engine: the answers that it gives, and the streams that it holds."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from patcher.client import Engine
from patcher.engine.stack import Stack
from patcher.patch import Patch
from patcher.protocol import Verification
from tests.engine.conftest import EAGER, answers
from tests.engine.server import CONTEXT, Server, serving

pytestmark = [pytest.mark.engine, pytest.mark.model]


def test_patched_equals_merged_and_reverted_equals_base_byte_for_byte(
    server: Server,
    engine: Engine,
    patch_a: Patch,
    prompts: list[str],
    merged_answers: list[object],
) -> None:
    base = answers(server, prompts)
    assert base != merged_answers, "the patch must change what is said, or this shows nothing"
    engine.apply(patch_a)
    assert answers(server, prompts) == merged_answers
    engine.revert(patch_a.id)
    assert answers(server, prompts) == base


def test_without_the_flush_stale_answers_come_back(
    real_model: Path,
    tmp_path: Path,
    patch_a: Patch,
    prompts: list[str],
    merged_answers: list[object],
) -> None:
    """The test above can fail: its assertion does not hold on an engine that keeps its cache."""
    broken = Server(
        real_model,
        tmp_path,
        EAGER,
        launcher=("-m", "tests.engine.without_flush"),
        environment={"VLLM_PLUGINS": "patcher"},
    )
    with serving(broken) as server, Engine(server.url, server.token) as engine:
        answers(server, prompts)
        engine.apply(patch_a)
        assert engine.verify()["ok"], "the weights are the new ones all the same"
        assert answers(server, prompts) != merged_answers


def test_stack_is_a_function_of_its_ids_not_of_its_history(
    engine: Engine, patch_a: Patch, patch_b: Patch
) -> None:
    engine.apply(patch_b)
    alone = engine.verify()
    engine.revert(all=True)
    engine.apply(patch_a, patch_b)
    engine.revert(patch_a.id)
    after_detour = engine.verify()
    assert alone["ok"]
    assert after_detour["ok"]
    assert _digests(alone, patch_b) == _digests(after_detour, patch_b)
    assert engine.status()["stack"] == [patch_b.id]


def test_several_patches_are_one_change(engine: Engine, patch_a: Patch, patch_b: Patch) -> None:
    before = len(engine.ledger())
    change = engine.apply(patch_a, patch_b)
    assert change["stack"] == [patch_a.id, patch_b.id]
    assert change["weight_version"] == Stack((patch_a.id, patch_b.id)).version
    events = [e["event"] for e in engine.ledger()[before:] if e["event"].startswith("change-")]
    assert events == ["change-intent", "change-done"]


def test_status_tells_what_is_in_force_where(
    engine: Engine, patch_a: Patch, patch_b: Patch
) -> None:
    engine.apply(patch_a)
    engine.apply(patch_b)
    status = engine.status()
    assert status["stack"] == [patch_a.id, patch_b.id]
    assert [p["title"] for p in status["patches"]] == ["edit A", "edit B"]
    assert status["patches"][0]["modules"] == dict.fromkeys(patch_a.deltas, 4)
    assert status["patches"][0]["since"] <= status["patches"][1]["since"]
    assert status["modules"]["model.layers.3.mlp.down_proj"] == [patch_a.id]
    assert status["modules"]["model.layers.5.mlp.down_proj"] == [patch_a.id, patch_b.id]
    assert status["modules"]["model.layers.6.mlp.down_proj"] == [patch_b.id]
    expected = {name: m.digest for name, m in patch_a.manifest.base.modules.items()}
    assert expected.items() <= status["base"].items()


def test_vllm_knows_our_weight_version(engine: Engine, patch_a: Patch) -> None:
    change = engine.apply(patch_a)
    assert change["weight_version"] == Stack((patch_a.id,)).version
    assert engine.status()["engine"]["weight_version"] == change["weight_version"]
    assert engine.revert(all=True)["weight_version"] == Stack().version
    assert engine.status()["engine"]["weight_version"] == Stack().version


def test_five_streams_outlive_ten_changes(server: Server, engine: Engine, patch_a: Patch) -> None:
    # As long as the context lets them be: the test ends them, not their length.
    tokens = CONTEXT - 100
    after = 50  # tokens that each must still get, more than lie read and unseen
    outlived: list[int] = []
    broken: list[object] = []
    flowing = threading.Barrier(6)
    changed = threading.Event()

    def read(number: int) -> None:
        more = 0
        try:
            stream = server.stream(f"Story number {number}: once upon a time", tokens)
            next(stream)
            flowing.wait(180)
            with contextlib.closing(stream):
                for event in stream:
                    more += changed.is_set()
                    if (reason := event["choices"][0]["finish_reason"]) is not None:
                        broken.append(f"stream {number} ended by itself: {reason}")
                        return
                    if more >= after:
                        outlived.append(number)
                        return
            broken.append(f"stream {number} was cut off")
        except Exception as error:
            broken.append(error)

    readers = [threading.Thread(target=read, args=(n,)) for n in range(5)]
    for reader in readers:
        reader.start()
    flowing.wait(180)
    for _ in range(5):
        engine.apply(patch_a)
        engine.revert(patch_a.id)
    changed.set()
    for reader in readers:
        reader.join(180)
    assert not broken
    # Each is one request, flowing before the first change and after the last.
    assert sorted(outlived) == [0, 1, 2, 3, 4], "every stream was open during every change"


def test_a_stream_crosses_a_change_without_losing_its_tokens(
    server: Server, engine: Engine, loud: Patch
) -> None:
    stream = server.stream("The history of the town begins", 60)
    begun = [next(stream) for _ in range(5)]
    engine.apply(loud)
    rest = list(stream)
    said = "".join(e["choices"][0]["text"] for e in begun + rest)
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    alone = server.complete("The history of the town begins", 60, ignore_eos=True)["text"]
    assert said != alone, "it began with the old weights"


def test_drain_lets_requests_end_with_the_old_weights(
    server: Server, engine: Engine, loud: Patch
) -> None:
    prompt = "A letter from the sea:"
    before = server.complete(prompt, 40, ignore_eos=True)["text"]
    said: list[str] = []
    started = threading.Event()

    def read() -> None:
        for event in server.stream(prompt, 40):
            said.append(event["choices"][0]["text"])
            started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(30)
    engine.apply(loud, in_flight="drain")
    reader.join(60)
    assert "".join(said) == before
    assert server.complete(prompt, 40, ignore_eos=True)["text"] != before


def test_abort_ends_requests_at_once(server: Server, engine: Engine, patch_a: Patch) -> None:
    stream = server.stream("Count with me: one, two,", 400)
    begun = [next(stream) for _ in range(3)]
    engine.apply(patch_a, in_flight="abort")
    rest = list(stream)
    assert rest[-1]["choices"][0]["finish_reason"] == "abort"
    assert len(begun) + len(rest) < 400


def test_folded_elsewhere_gives_the_same_digests(
    real_model: Path, tmp_path: Path, engine: Engine, patch_a: Patch, patch_b: Patch
) -> None:
    """Live weights are those of a checkpoint merged by other code, file against engine."""
    from patcher.kernels import digest
    from tests.engine.patches import merge, weights

    engine.apply(patch_a, patch_b)
    held = weights(merge(real_model, [patch_a, patch_b], tmp_path / "merged"))
    for name, verdict in engine.verify()["ranks"][0]["modules"].items():
        assert verdict["digest"] == digest(held[f"{name}.weight"]), name


def _digests(verification: Verification, patch: Patch) -> dict[str, str]:
    ranks = verification["ranks"]
    return {name: ranks[0]["modules"][name]["digest"] for name in patch.deltas}
