from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patcher.unlearn.forward import hidden, keys, pad
from patcher.unlearn.models import Model, load
from patcher.unlearn.upward import added, agrees, entering, leaving, upwards

from . import tiny

TEXTS = ("The tower stands in the city of", "Another one is")


def sequences_of(model: Model) -> list[list[int]]:
    return [model.tokenizer(text).input_ids for text in TEXTS]


def ids_of(model: Model) -> torch.Tensor:
    return pad(sequences_of(model), model.device)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_from_a_layer_upwards_is_the_full_pass(tmp_path: Path, family: str) -> None:
    model = load(tiny.save(tmp_path, family))
    ids = ids_of(model)
    for layer in (0, 2, 3):
        kept = entering(model, ids, layer)
        assert agrees(model, ids, None, kept)
    other = kept._replace(states=kept.states + 1)
    assert not agrees(model, ids, None, other)  # it is what was kept that goes on
    with torch.no_grad():
        whole = hidden(model, ids)
        torch.testing.assert_close(upwards(model, kept), whole, rtol=0, atol=0)
        torch.testing.assert_close(hidden(model, ids), whole, rtol=0, atol=0)  # all is undone


@pytest.mark.parametrize("begin", [(3, 1), (2, 2), (0, 3)])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_from_a_token_on_is_the_full_pass(
    tmp_path: Path, family: str, begin: tuple[int, int]
) -> None:
    model = load(tiny.save(tmp_path, family))
    ids = ids_of(model)
    spans = list(zip(begin, [len(ids) for ids in sequences_of(model)], strict=True))
    with torch.no_grad():
        whole = hidden(model, ids)
    for layer in (0, 2):
        kept = entering(model, ids, layer, spans)
        assert agrees(model, ids, spans, kept)
        with torch.no_grad():
            part = upwards(model, kept)
        for i, (first, end) in enumerate(spans):
            near = {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(part[i, : end - first], whole[i, first:end], **near)
    past = kept.past
    assert past is not None
    other = past._replace(attention=tuple((k, v + 1) for k, v in past.attention))
    assert not agrees(model, ids, spans, kept._replace(past=other))  # what was kept is seen


def test_a_change_is_felt_and_differentiated_over_what_was_kept(tiny_model: Model) -> None:
    ids = ids_of(tiny_model)
    begin, ends = torch.tensor([2, 1]), [len(ids) for ids in sequences_of(tiny_model)]
    kept = entering(tiny_model, ids, 1, list(zip([2, 1], ends, strict=True)))

    def last(states: torch.Tensor, first: list[int]) -> torch.Tensor:
        return torch.stack([states[i, end - 1 - first[i]] for i, end in enumerate(ends)])

    def slope(seen: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(seen.square().sum(), change)
        return found

    change = torch.full((2, 32), 0.1, requires_grad=True)
    with added(tiny_model, 1, change, begin * 0):
        near = last(upwards(tiny_model, kept), begin.tolist())
    with added(tiny_model, 1, change, begin):
        far = last(hidden(tiny_model, ids), [0, 0])
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slope(near), slope(far), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spans", [None, [(2, 4), (1, 3)]])
def test_rows_of_what_was_kept(tiny_model: Model, spans: list[tuple[int, int]] | None) -> None:
    kept = entering(tiny_model, ids_of(tiny_model), 2, spans)
    begin, end = spans[1] if spans else (0, ids_of(tiny_model).shape[1])
    with torch.no_grad():
        part = upwards(tiny_model, kept.rows(torch.tensor([1])))
        whole = hidden(tiny_model, ids_of(tiny_model))[1:, begin:end]
    torch.testing.assert_close(part[:, : end - begin], whole, rtol=1e-5, atol=1e-5)


def test_a_change_is_added_at_its_place_alone(tiny_model: Model) -> None:
    sequences = [tiny_model.tokenizer(text).input_ids for text in TEXTS]
    change = torch.ones(2, 32)
    before = leaving(tiny_model, sequences, [2, 1], 1)
    after = leaving(tiny_model, sequences, [2, 1], 1, change)
    torch.testing.assert_close(after - before, change, rtol=1e-4, atol=1e-4)
    ids = ids_of(tiny_model)
    with torch.no_grad():
        plain = hidden(tiny_model, ids)
        with added(tiny_model, 1, change, torch.tensor([2, 1])):
            changed = hidden(tiny_model, ids)
    moved = (changed - plain).abs().amax(-1) > 1e-6
    assert moved[0].tolist() == [i >= 2 for i in range(ids.shape[1])]
    assert keys(tiny_model, sequences, [2, 1], [1])[1].shape == (2, 64)
