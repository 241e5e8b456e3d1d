"""Plans, which prepare a change and let go of it; and a stack that becomes one patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from patcher.client import Engine
from patcher.engine.planning import plan
from patcher.engine.service import PatchService
from patcher.engine.signatures import Trust
from patcher.errors import BaseMismatchError
from patcher.patch import Delta, Patch
from patcher.patch.merge import merge
from tests.engine.fake_vllm import D_OUT, FakeClient
from tests.engine.server import Server
from tests.engine.test_faults import change, make, put, refuse, run
from tests.engine.test_refusals import patcher
from tests.signing.reviewers import Reviewers


def live(client: FakeClient) -> list[bytes]:
    return [
        layer.weight.view(torch.uint8).numpy().tobytes()
        for worker in client.workers
        for layer in worker.model.layers  # type: ignore[union-attr]
    ]


def planned(
    service: PatchService, client: FakeClient, *patches: Patch, bundles: Any = None
) -> dict[str, Any]:
    """A plan, which must leave no trace."""
    before = (
        live(client),
        service.store.ledger(),
        service.store.patches(),
        client.log.count("pause"),
    )
    found = run(plan(service, patches, bundles or {}))
    after = live(client), service.store.ledger(), service.store.patches(), client.log.count("pause")
    assert after == before
    for rank in run(service.ranks.probe()):
        assert rank["change"] is None
        assert set(rank["held"]) == set(service.store.in_force().ids)
    return found


def codes(found: dict[str, Any]) -> list[str]:
    assert found["ok"] == (not found["refusals"])
    return [one["code"] for one in found["refusals"]]


def test_a_plan_prepares_the_change_and_lets_go_of_it(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    below, above = make(weights, 1), make(weights, 2, layers=(1, 2))
    put(service, below)
    found = planned(service, client, above)
    assert codes(found) == []
    assert found["stack"] == [below.id, above.id]
    assert found["modules"]["layers.1"]["patches"] == [below.id, above.id]
    size = weights[0].nbytes
    assert (found["staged_bytes"], found["base_bytes"]) == (2 * size, size)
    assert found["pause_ms"] > 0
    assert put(service, below, above).stack.version == found["weight_version"]


def test_every_reason_to_refuse_is_told_at_once(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    others = [torch.zeros_like(weight) for weight in weights]
    found = planned(service, client, make(others, 1, layers=(0, 1)))
    assert codes(found) == ["base-mismatch", "base-mismatch"]
    assert [one["module"] for one in found["refusals"]] == ["layers.0", "layers.1"]
    assert all(one["exit_code"] == 4 for one in found["refusals"])


def killed_after_commit(service: PatchService) -> None:
    """A revert of everything, whose API server died before it was recorded."""

    async def half() -> None:
        await service.ranks.call("patcher_begin", "dead", [])
        for name in service.store.in_force().modules(service.store.manifests()):
            await service.transition.stage_module("dead", name)
        await service.ranks.call("patcher_commit", "dead")

    run(half())


def test_a_plan_after_a_change_that_was_not_ended_leaves_it_alone(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    """Its pristine copies are what a revert needs."""
    first, second = make(weights, 1), make(weights, 2)
    put(service, first)
    killed_after_commit(service)
    found = run(plan(service, [second], {}))
    assert codes(found) == ["engine-refused"]
    assert "not ended" in found["refusals"][0]["message"]
    put(service, first)
    put(service)
    assert all(torch.equal(live, base) for live, base in zip(client.live(), weights, strict=True))
    assert run(service.verify())["ok"]


def test_a_plan_ends_a_change_whose_end_is_not_there_yet(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    """The ranks are asked to let go after the answer, maybe by another API server."""
    first, second = make(weights, 1), make(weights, 2)
    client.hangs = {"patcher_finish"}
    run(change(service, first, settle=False))
    client.hangs = set()
    assert run(plan(service, [second], {}))["refusals"] == []
    assert all(worker._patcher_state.change is None for worker in client.workers)
    assert run(service.verify())["ok"]


def test_a_rank_lets_go_of_nothing_while_another_change_is_held(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    put(service, make(weights, 1))
    killed_after_commit(service)
    run(service.transition.discard("another"))
    put(service, make(weights, 1))
    put(service)
    assert all(torch.equal(live, base) for live, base in zip(client.live(), weights, strict=True))


def test_a_weight_that_is_no_base_is_not_taken_for_one(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    """With no patch left on a module nothing else would tell."""
    patch = make(weights, 1)
    put(service, patch)
    for worker in client.workers:
        worker._patcher_state.bases.clear()  # type: ignore[attr-defined]
    with pytest.raises(BaseMismatchError):
        put(service)
    assert service.store.in_force().ids == (patch.id,)


def test_what_the_stack_refuses(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    patch = make(weights, 1)
    put(service, patch)
    assert codes(planned(service, client, patch)) == ["already-applied"]
    needy = Patch.build(
        patch.manifest.model_copy(update={"requires": ("ab" * 32,)}), dict(patch.deltas)
    )
    assert codes(planned(service, client, needy)) == ["stack-conflict"]


def test_a_patch_that_overflows_the_weights(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    for worker in client.workers:
        worker.model.layers[0].weight.mul_(1e37)  # type: ignore[union-attr,operator]
    honest = make([weights[0] * 1e37, *weights[1:]], 1)
    loud = Delta.multiplicative(torch.eye(D_OUT), torch.eye(D_OUT) * 500)
    found = planned(
        service, client, Patch.build(honest.manifest, {**honest.deltas, "layers.0": loud})
    )
    assert codes(found) == ["engine-refused"]
    assert found["refusals"][0]["module"] == "layers.0"


def test_a_rank_that_fails_while_it_prepares(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    for failing in (refuse, full):
        client.fail["patcher_receive", 1] = failing
        found = run(plan(service, [make(weights, 1)], {}))
        assert codes(found) == ["engine-refused"]
    client.fail.clear()
    assert codes(planned(service, client, make(weights, 1))) == []


def test_whose_signatures_are_missing(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor], tmp_path: Path
) -> None:
    people = Reviewers(tmp_path)
    patch = make(weights, 1)
    service.trust = Trust(service.store, people.policy("signatures = 2", "alice", "bob"))
    alice, bob = people.bundle("alice", patch), people.bundle("bob", patch)
    found = planned(service, client, patch, bundles={patch.id: [alice]})
    assert codes(found) == ["not-trusted"]
    found = planned(service, client, patch, bundles={patch.id: [alice, bob]})
    assert codes(found) == []
    assert found["signers"] == {patch.id: ["alice", "bob"]}


def test_the_same_title_with_another_digest_is_questioned(
    service: PatchService, client: FakeClient, weights: list[torch.Tensor]
) -> None:
    first = make(weights, 1)
    second = make(weights, 2)
    renamed = Patch.build(
        second.manifest.model_copy(update={"title": first.manifest.title}), dict(second.deltas)
    )
    put(service, first)
    (question,) = planned(service, client, renamed)["questions"]
    assert first.id[:12] in question
    assert planned(service, client, second)["questions"] == []
    assert put(service, first, renamed).questions == [question]
    assert put(service, renamed).questions == []
    replaced = make(weights, 3)
    again = Patch.build(
        replaced.manifest.model_copy(update={"title": first.manifest.title}), dict(replaced.deltas)
    )
    assert put(service, again).questions == [], "it takes the other's place"


@pytest.mark.engine
@pytest.mark.model
def test_a_stack_becomes_one_patch_on_the_real_engine(
    server: Server, engine: Engine, patch_a: Patch, patch_b: Patch, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in ("a.st", "b.st", "merged.st")]
    merged = merge([patch_a, patch_b]).patch
    for patch, path in zip((patch_a, patch_b, merged), paths, strict=True):
        patch.write(path)

    def call(*words: object) -> tuple[int, Any]:
        return patcher(*map(str, words), token=server.token, url=server.url)

    code, found = call("plan", *paths[:2])
    assert code == 0
    assert engine.status()["stack"] == []
    assert engine.apply(*paths[:2])["weight_version"] == found["weight_version"]
    prompt = "The capital of France is"
    together = server.complete(prompt, 24)["text"]
    code, change = call("replace", "--all", "--by", paths[2], "--reason", "squash")
    assert (code, change["stack"]) == (0, [merged.id])
    assert engine.verify()["ok"]
    # The composition is stored in float32, so a weight may differ in its last bit.
    assert server.complete(prompt, 24)["text"] == together
    assert call("plan", paths[2])[0] == 6
