from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patcher.unlearn.forward import hidden, keys, pad
from patcher.unlearn.models import Model, load
from patcher.unlearn.upward import added, agrees, entering, leaving, stepping_over

from . import tiny

TEXTS = ("The tower stands in the city of", "Another one is")


def ids_of(model: Model) -> torch.Tensor:
    return pad([model.tokenizer(text).input_ids for text in TEXTS], model.device)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_from_a_layer_upwards_is_the_full_pass(tmp_path: Path, family: str) -> None:
    model = load(tiny.save(tmp_path, family))
    ids = ids_of(model)
    for layer in (0, 2, 3):
        kept = entering(model, ids, layer)
        assert agrees(model, ids, kept)
    other = kept._replace(states=kept.states + 1)
    assert not agrees(model, ids, other)  # it is what was kept that goes on
    with torch.no_grad():
        whole = hidden(model, ids)
        with stepping_over(model, kept):
            part = hidden(model, ids)
        torch.testing.assert_close(part, whole, rtol=0, atol=0)
        torch.testing.assert_close(hidden(model, ids), whole, rtol=0, atol=0)  # all is undone


def test_rows_of_what_was_kept(tiny_model: Model) -> None:
    ids = ids_of(tiny_model)
    kept = entering(tiny_model, ids, 2).rows(torch.tensor([1]))
    with torch.no_grad(), stepping_over(tiny_model, kept):
        part = hidden(tiny_model, ids[1:])
    torch.testing.assert_close(part, hidden(tiny_model, ids)[1:], rtol=1e-5, atol=1e-5)


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
