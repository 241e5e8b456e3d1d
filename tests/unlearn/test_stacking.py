"""Patches on top of patches: what is required, what is checked, what stays forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patcher.client import Engine
from patcher.errors import (
    BaseMismatchError,
    InvalidPatchError,
    StackConflictError,
    UnknownPatchError,
    UsageError,
)
from patcher.kernels import LowRank
from patcher.patch import Delta, Manifest, Patch, check_module, module_base
from patcher.unlearn import compute
from patcher.unlearn.facts import read_facts
from patcher.unlearn.forward import answered, as_edit, beneath, folded
from patcher.unlearn.gate import Strength, gate
from patcher.unlearn.models import Model
from patcher.unlearn.prompts import Encoded, encode
from patcher.unlearn.slopes import Wish
from patcher.unlearn.stacking import (
    Earlier,
    came_back,
    forgotten_before,
    lower_patches,
    recovered,
    replaced,
    stacked,
    still_forgotten,
)
from tests.fake_engine import TOKEN, FakeEngine
from tests.small_patch import small_patch

from .conftest import said_by

LAYERS = [1, 2]
MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def rows(tiny_model: Model) -> list[dict[str, Any]]:
    return said_by(tiny_model)


@pytest.fixture(scope="module")
def lower(
    tiny_folder: Path, rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Patch]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        place = tmp_path_factory.getbasetemp()
        monkeypatch.setenv("PATCHER_SALT_FILE", str(place / "salt"))
        monkeypatch.setenv("PATCHER_CACHE", str(place / "cache"))
        yield compute(tiny_folder, rows[:2], layers=LAYERS).patch


@pytest.fixture(scope="module")
def above(tiny_model: Model, lower: Patch) -> list[dict[str, Any]]:
    """What the model says with the lower patch in force."""
    with stacked(tiny_model, [lower]):
        return said_by(tiny_model)


def said(model: Model, rows: list[dict[str, Any]], *stack: Patch) -> list[bool]:
    pairs = [encode(model.tokenizer, row["prompt"], row["target"]) for row in rows]
    with folded(model, *(as_edit(patch.deltas) for patch in stack)):
        return answered(model, pairs)


def remade(patch: Patch, **fields: Any) -> Patch:
    manifest = Manifest.model_validate({**patch.manifest.model_dump(), **fields})
    return Patch.build(manifest, patch.deltas)


def test_a_patch_on_top_requires_what_lies_beneath_and_names_the_pristine_base(
    tiny_folder: Path, tiny_model: Model, rows: list[dict[str, Any]], lower: Patch
) -> None:
    result = compute(
        tiny_folder, rows[2:4], layers=LAYERS, on_top_of=[lower], keep_forgotten=[rows[:2]]
    )
    upper = result.patch
    assert upper.manifest.requires == (lower.id,)
    for name, base in upper.manifest.base.modules.items():
        check_module(name, base, tiny_model.served(name))
    # Folded in order, the stack does what the check measured.
    assert not any(said(tiny_model, rows[:4], lower, upper))
    assert result.evaluation["answered"] == 0
    assert result.evaluation["still_forgotten"] == {"patched": 2, "base": 2, "of": 2}


def test_what_the_stack_made_the_model_forget_is_not_known_on_top_of_it(
    tiny_folder: Path, rows: list[dict[str, Any]], above: Any, lower: Patch, tmp_path: Path
) -> None:
    lower.write(tmp_path / "lower.st")
    result = compute(
        tiny_folder,
        [*rows[:2], above[0]],
        layers=LAYERS,
        known_only=True,
        on_top_of=[tmp_path / "lower.st"],
    )
    assert (result.facts, result.known) == (3, 1)


def test_the_stack_is_another_computation(
    tiny_folder: Path, rows: list[dict[str, Any]], lower: Patch
) -> None:
    alone = compute(tiny_folder, rows[2:3], layers=LAYERS).patch
    above = compute(tiny_folder, rows[2:3], layers=LAYERS, on_top_of=[lower]).patch
    again = compute(tiny_folder, rows[2:3], layers=LAYERS, on_top_of=[lower]).patch
    assert above.data == again.data
    assert any((alone.deltas[n].right != above.deltas[n].right).any() for n in alone.deltas)


def test_beneath_is_the_fold_of_the_stack_and_goes_away_again(
    tiny_model: Model, lower: Patch
) -> None:
    before, upper = tiny_model.digest(), {MODULE: _random(tiny_model, 7)}
    with folded(tiny_model, as_edit(lower.deltas), upper):
        wanted = tiny_model.weight(MODULE).clone()
    with stacked(tiny_model, [lower]):
        assert tiny_model.digest() != before
        inside = tiny_model.weight(MODULE).clone()
        with folded(tiny_model, upper):
            assert torch.equal(tiny_model.weight(MODULE), wanted)
        assert torch.equal(tiny_model.weight(MODULE), inside)
        assert module_base(tiny_model.served(MODULE)) == lower.manifest.base.modules[MODULE]
        with beneath(tiny_model, upper):
            assert torch.equal(tiny_model.weight(MODULE), wanted)
            assert len(tiny_model.under) == 2
    assert (tiny_model.digest(), tiny_model.under) == (before, ())


def _random(model: Model, seed: int, rank: int = 2) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    d_out = len(model.weight(MODULE))
    left, right = (torch.randn(*s, generator=draw) for s in ((d_out, rank), (rank, d_out)))
    return LowRank("multiplicative", 0.1 * left, 0.1 * right)


def test_another_base_is_refused(
    tiny_folder: Path, rows: list[dict[str, Any]], lower: Patch
) -> None:
    with pytest.raises(BaseMismatchError):
        compute(tiny_folder, rows[:1], on_top_of=[small_patch()])
    fields = lower.manifest.model_dump()
    fields["base"]["modules"][MODULE]["digest"] = "0" * 64
    with pytest.raises(BaseMismatchError):
        compute(tiny_folder, rows[:1], on_top_of=[remade(lower, base=fields["base"])])


def test_what_is_no_stack_is_refused(lower: Patch, tmp_path: Path) -> None:
    with pytest.raises(StackConflictError, match="twice"):
        lower_patches([lower, lower])
    upper = remade(lower, requires=[lower.id], title="upper")
    assert lower_patches([lower, upper]) == (lower, upper)
    for wrong in ([upper], [upper, lower]):
        with pytest.raises(StackConflictError, match="requires"):
            lower_patches(wrong)
    with pytest.raises(UsageError, match="--engine"):
        lower_patches([lower.id[:12]])
    with pytest.raises(InvalidPatchError):
        lower_patches([tmp_path / "missing.st"])


def test_the_stack_in_force_at_an_engine(fake: FakeEngine, lower: Patch, tmp_path: Path) -> None:
    second, stored = (remade(lower, title=title) for title in ("second", "stored"))
    assert lower_patches(engine=fake.url, token=TOKEN) == ()
    with Engine(fake.url, TOKEN) as engine:
        engine.apply(lower, second)
        engine.upload(stored)
        assert lower_patches(engine=engine) == (lower, second)
        assert lower_patches([second.id[:10].upper()], engine) == (second,)
        assert lower_patches([lower.id, stored.id], engine) == (lower, stored)
        second.write(tmp_path / "second.st")
        assert lower_patches([lower.id, tmp_path / "second.st"], engine) == (lower, second)
        with pytest.raises(UsageError, match="order"):
            lower_patches([second.id, lower.id], engine)
        for unknown in ("f" * 64, "x" * 5000):
            with pytest.raises(UnknownPatchError, match="holds no patch"):
                lower_patches([unknown], engine)


def test_computing_on_top_of_an_engine(
    fake: FakeEngine, tiny_folder: Path, rows: list[dict[str, Any]], lower: Patch
) -> None:
    with Engine(fake.url, TOKEN) as engine:
        engine.apply(lower)
        patch = compute(tiny_folder, rows[2:3], layers=LAYERS, engine=engine).patch
    assert patch.manifest.requires == (lower.id,)


def test_earlier_facts_without_a_stack_are_a_mistake(
    tiny_folder: Path, rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(UsageError, match="on-top-of"):
        compute(tiny_folder, rows[:1], keep_forgotten=[rows[1:]])


def test_earlier_facts_that_are_still_answered_or_asked_anew_do_not_count(
    tiny_model: Model, rows: list[dict[str, Any]], above: Any, lower: Patch
) -> None:
    facts = read_facts([*rows[:2], *above[:2]])
    with stacked(tiny_model, [lower]):
        found = forgotten_before(tiny_model, facts, facts[1:2])
        assert (len(found.encoded), found.given) == (1, 3)
        assert still_forgotten(tiny_model, found) == 1
    assert still_forgotten(tiny_model, found) == 0


def test_what_comes_back_gets_a_wish_that_grows(
    tiny_model: Model, rows: list[dict[str, Any]]
) -> None:
    prompt, answer = encode(tiny_model.tokenizer, rows[0]["prompt"], rows[0]["target"])
    unsaid = [(answer[0] + 1) % 300]
    earlier = Earlier((Encoded(prompt, unsaid, 1), Encoded(prompt, answer, 1)), 2)
    own = Wish([5], 6, -7.0, 0)
    (wish,) = came_back(tiny_model, earlier, [own])
    assert (wish.ids, wish.token, wish.fact) == (prompt, answer[0], -2)
    (stronger,) = came_back(tiny_model, earlier, [own, wish])
    assert stronger == replace(wish, goal=wish.goal - 2.0)
    assert replaced([own, wish], [stronger]) == [own, stronger]


@given(st.integers(0, 10**6), st.integers(1, 3))
def test_the_inputs_of_a_closed_form_gate_are_recovered_from_it(seed: int, n: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    W, K = torch.randn(6, 9, generator=draw), torch.randn(n, 9, generator=draw)
    data = torch.randn(40, 9, generator=draw)
    C = data.T @ data / len(data)
    right = gate(W, K, C, Strength(ridge=1e-6)).right
    delta = LowRank("multiplicative", torch.randn(6, n, generator=draw), right)
    turn = torch.randn(n, n, generator=draw) + 3 * torch.eye(n)
    other = LowRank("multiplicative", delta.left @ turn, torch.linalg.solve(turn, delta.right))
    outputs = W.double() @ K.double().T
    for one in (delta, other):
        keys = recovered(_holding(W, one), MODULE, C)
        torch.testing.assert_close(keys.square().sum() / n, C.double().trace())
        # The facts' own outputs lie in the span of what is recovered.
        found = W.double() @ keys.T
        rest = outputs - found @ torch.linalg.lstsq(found, outputs).solution
        assert rest.norm() <= 1e-3 * outputs.norm()


def _holding(weight: torch.Tensor, delta: LowRank) -> Any:
    """As much of a model as is looked at: one weight, one delta beneath."""

    class Holding:
        under = ({MODULE: delta},)

        def served(self, name: str) -> torch.Tensor:
            return weight

    return Holding()


def test_the_keys_of_an_additive_delta_are_those_that_open_it(tiny_model: Model) -> None:
    d_out, d_in = tiny_model.weight(MODULE).shape
    draw = torch.Generator().manual_seed(3)
    data = torch.randn(200, d_in, generator=draw)
    C = data.T @ data / len(data)
    key = torch.randn(1, d_in, generator=draw)
    B = torch.linalg.solve(C, key.T).T
    delta = Delta.additive(torch.randn(d_out, 1, generator=draw), B)
    with beneath(tiny_model, {MODULE: delta.to_torch()}):
        found = recovered(tiny_model, MODULE, C)
        assert len(recovered(tiny_model, "model.layers.3.mlp.down_proj", C)) == 0
    cosine = torch.nn.functional.cosine_similarity(found, key.double()).abs()
    assert cosine.item() == pytest.approx(1, abs=1e-4)


def test_a_lower_patchs_inputs_are_left_alone(
    tiny_folder: Path, tiny_model: Model, rows: Any, lower: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new gate opens less at what the lower patch acts on than one that isn't told of it."""

    def made() -> Patch:
        return compute(tiny_folder, rows[2:4], layers=LAYERS, on_top_of=[lower]).patch

    def opened(patch: Patch) -> float:
        total = 0.0
        with stacked(tiny_model, [lower]):
            for name, delta in patch.deltas.items():
                weight = tiny_model.weight(name)
                keys = recovered(tiny_model, name, torch.eye(weight.shape[1])).float()
                right = delta.to_torch().right
                total += (right @ weight @ keys.T).norm().item() / right.norm().item()
        return total

    told = opened(made())
    monkeypatch.setattr("patcher.unlearn.preserved.forgotten_moments", lambda job, moments: {})
    assert told < 0.9 * opened(made())
