"""Wishes are looked at anew where the edit has moved them, and foretold elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from patcher.unlearn import linearised
from patcher.unlearn.forward import keys
from patcher.unlearn.gate import Gate, Strength, gate
from patcher.unlearn.linearised import Linearised
from patcher.unlearn.models import Model
from patcher.unlearn.slopes import Slopes, Values, Wish, of_wishes

PROMPTS = [[1, 2, 3, 4], [5, 6], [7, 8, 9], [2, 4, 6, 8, 10], [11, 3]]
WISHES = [Wish(ids, 20 + i, -3.0, i) for i, ids in enumerate(PROMPTS)]
LAYERS = (1, 2)


@pytest.fixture
def gates(tiny_model: Model) -> dict[int, Gate]:
    found = keys(tiny_model, PROMPTS, [len(ids) - 1 for ids in PROMPTS], LAYERS)
    return {
        layer: gate(
            tiny_model.weight(tiny_model.module_name(layer)),
            found[layer],
            torch.eye(found[layer].shape[1]) * 1e-4,
            Strength(),
        )
        for layer in LAYERS
    }


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[list[Wish]]:
    """The wishes that the model was run for, by call."""
    calls: list[list[Wish]] = []

    def counted(model: Model, gates: Any, wishes: Sequence[Wish], values: Values) -> Any:
        calls.append(list(wishes))
        return of_wishes(model, gates, wishes, values)

    monkeypatch.setattr(linearised, "of_wishes", counted)
    return calls


def drawn(seen: Linearised, scale: float, seed: int = 0) -> Values:
    draw = torch.Generator().manual_seed(seed)
    return {
        layer: scale * torch.randn(value.shape, generator=draw)
        for layer, value in seen.start().items()
    }


def dense(slopes: dict[int, Slopes], wishes: int) -> dict[int, torch.Tensor]:
    """Each wish's slope as one matrix, ``[wishes, d_out, n]``."""
    return {
        layer: torch.stack(
            [part.outputs[part.row == i].T @ part.gates[part.row == i] for i in range(wishes)]
        )
        for layer, part in slopes.items()
    }


def check_slopes(seen: Linearised, must: dict[int, Slopes], wishes: int) -> None:
    for layer, found in dense(seen.slopes, wishes).items():
        torch.testing.assert_close(found, dense(must, wishes)[layer], rtol=1e-3, atol=1e-5)


def plus(values: Values, change: Values, scale: float = 1.0) -> Values:
    return {layer: value + scale * change[layer] for layer, value in values.items()}


def moved_by(slopes: dict[int, Slopes], change: Values) -> torch.Tensor:
    """Nats by which the tokens of each wish move, in all."""
    found = torch.zeros(len(WISHES), dtype=torch.float64)
    for layer, part in slopes.items():
        for row, output, gated in zip(part.row.tolist(), part.outputs, part.gates, strict=True):
            found[row] += float((output @ change[layer] @ gated).abs())
    return found


def test_what_has_hardly_moved_is_foretold(
    tiny_model: Model, gates: dict[int, Gate], looked: list[list[Wish]]
) -> None:
    seen = Linearised(tiny_model, gates)
    first = drawn(seen, 1.0)
    before = seen.look(WISHES, first)
    near = plus(first, drawn(seen, 1e-2, seed=1))
    told = seen.look(WISHES, near)
    assert len(looked) == 1
    true, _ = of_wishes(tiny_model, gates, WISHES, near)
    assert (true - before).abs().max() > 1e-3
    assert (told - true).abs().max() < 0.1 * (true - before).abs().max()


def test_what_has_moved_is_looked_at_anew(
    tiny_model: Model, gates: dict[int, Gate], looked: list[list[Wish]]
) -> None:
    seen = Linearised(tiny_model, gates)
    seen.look(WISHES, seen.start())
    far = drawn(seen, 30.0)
    told = seen.look(WISHES, far)
    assert looked[1:] == [WISHES]
    true, slopes = of_wishes(tiny_model, gates, WISHES, far)
    torch.testing.assert_close(told, true)
    check_slopes(seen, slopes, len(WISHES))


def test_only_what_has_moved_is_looked_at(
    tiny_model: Model,
    gates: dict[int, Gate],
    looked: list[list[Wish]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = Linearised(tiny_model, gates)
    first, change = drawn(seen, 1.0), drawn(seen, 0.1, seed=1)
    seen.look(WISHES, first)
    far = moved_by(seen.slopes, change)
    monkeypatch.setattr(linearised, "STALE", float(far.median()) * 1.001)
    values = plus(first, change)
    told = seen.look(WISHES, values)
    moved = [wish for wish, by in zip(WISHES, far, strict=True) if by > linearised.STALE]
    assert looked[1:] == [moved]
    assert 0 < len(moved) < len(WISHES)
    true, slopes = of_wishes(tiny_model, gates, moved, values)
    at = [WISHES.index(wish) for wish in moved]
    torch.testing.assert_close(told[at], true)
    whole = dense(seen.slopes, len(WISHES))
    for layer, own in dense(slopes, len(moved)).items():
        torch.testing.assert_close(whole[layer][at], own, rtol=1e-3, atol=1e-5)


def test_movements_add_up_until_they_count(
    tiny_model: Model, gates: dict[int, Gate], looked: list[list[Wish]]
) -> None:
    seen = Linearised(tiny_model, gates)
    first, way = drawn(seen, 3.0), drawn(seen, 1.0, seed=1)
    seen.look(WISHES, first)
    step = 0.4 * linearised.STALE / float(moved_by(seen.slopes, way).max())
    assert 3 * step < linearised.OTHER * 3.0
    for turn in (1, 2):
        seen.look(WISHES, plus(first, way, turn * step))
    assert len(looked) == 1
    seen.look(WISHES, plus(first, way, 3 * step))
    assert len(looked) == 2


def test_without_a_slope_it_counts_how_much_of_the_edit_is_another(
    tiny_model: Model,
    gates: dict[int, Gate],
    looked: list[list[Wish]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Far out the model hardly answers to the edit, and a step of a tenth of a nat is huge."""
    monkeypatch.setattr(linearised, "STALE", float("inf"))
    seen = Linearised(tiny_model, gates)
    first = drawn(seen, 1.0)
    seen.look(WISHES, first)
    seen.look(WISHES, plus(first, first, 0.9 * linearised.OTHER))
    assert len(looked) == 1
    seen.look(WISHES, plus(first, first, 1.1 * linearised.OTHER))
    assert len(looked) == 2


def test_another_goal_needs_no_look_and_another_place_needs_one(
    tiny_model: Model, gates: dict[int, Gate], looked: list[list[Wish]]
) -> None:
    seen = Linearised(tiny_model, gates)
    first = seen.look(WISHES, seen.start())
    rising = [replace(wish, rise=True, token=40 + i) for i, wish in enumerate(WISHES)]
    further = [replace(wish, goal=wish.goal - 2.0) for wish in reversed(WISHES)]
    told = seen.look([*further, rising[0]], seen.start())
    torch.testing.assert_close(told[:-1], first.flip(0) + 2.0)
    assert looked[1:] == [[rising[0]]]
    raised = seen.look([replace(rising[0], goal=rising[0].goal + 1.5)], seen.start())
    torch.testing.assert_close(raised, told[-1:] + 1.5)
    assert len(looked) == 2
    check_slopes(seen, of_wishes(tiny_model, gates, [rising[0]], seen.start())[1], 1)
