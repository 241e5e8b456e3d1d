from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from patcher.errors import InputError, UsageError
from patcher.patch import Patch
from patcher.unlearn import compute
from patcher.unlearn.forward import answered, as_edit, folded, next_tokens
from patcher.unlearn.methods import gd
from patcher.unlearn.models import Model
from patcher.unlearn.prompts import encode
from patcher.unlearn.registry import METHODS
from patcher.unlearn.training import Factors, Row, drawn, editing, judged

from .conftest import said_by

TRAINED = ("zero-gd", "zero-gated", "ft", "ga", "npo")


@pytest.fixture(scope="module")
def rows(tiny_model: Model) -> list[dict[str, Any]]:
    return said_by(tiny_model)[:3]


def still_said(model: Model, rows: list[dict[str, Any]], patch: Patch) -> int:
    pairs = [encode(model.tokenizer, row["prompt"], row["target"]) for row in rows]
    with folded(model, as_edit(patch.deltas)):
        return sum(answered(model, pairs))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of statistics and journals that the tests share."""
    return tmp_path_factory.mktemp("trained")


class Interrupted(Exception):  # noqa: N818 - it stands for a killed process
    pass


class Stop:
    """A progress that interrupts the training at one of its steps."""

    def __init__(self, at: int) -> None:
        self.at, self.training, self.first = at, False, 0

    def start(self, what: str, total: int | None) -> None:
        self.training = what == "Training"

    def step(self, done: int, note: str = "") -> None:
        if self.training:
            self.first = self.first or done
            if done == self.at:
                raise Interrupted

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("method", TRAINED)
def test_answers_go_and_an_interrupted_training_ends_in_the_same_bytes(
    tiny_folder: Path,
    tiny_model: Model,
    rows: list[dict[str, Any]],
    place: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("patcher.unlearn.training.KEEP", 2)
    monkeypatch.setattr("patcher.unlearn.methods.gated.STEPS", 6)
    options: dict[str, Any] = {"layers": "1,2", "method": method, "cache": place}
    whole = compute(tiny_folder, rows, **options)
    assert still_said(tiny_model, rows, whole.patch) == whole.evaluation["answered"] == 0
    kinds = {delta.kind for delta in whole.patch.deltas.values()}
    assert kinds == {METHODS[method].kind}
    assert whole.patch.manifest.method.name == method
    at = 150 if method == "zero-gd" else 3
    with pytest.raises(Interrupted):
        compute(tiny_folder, rows, progress=Stop(at), **options)
    seen = Stop(-1)
    again = compute(tiny_folder, rows, progress=seen, **options)
    assert seen.first == (101 if method == "zero-gd" else 3)  # it did not begin anew
    assert again.patch.data == whole.patch.data
    assert not any((place / "jobs").iterdir())


def test_a_patch_that_could_not_be_written_is_not_computed_anew(
    tiny_folder: Path,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise UsageError("Can't write it.", "Make room.")

    monkeypatch.setattr("patcher.unlearn.methods.gated.STEPS", 6)
    options: dict[str, Any] = {"layers": "1", "method": "zero-gated", "cache": tmp_path / "cache"}
    jobs = tmp_path / "cache" / "jobs"
    with monkeypatch.context() as patched:
        patched.setattr(Patch, "write", full)
        with pytest.raises(UsageError, match="Can't write"):
            compute(tiny_folder, rows, tmp_path / "p.st", **options)
    assert any(jobs.iterdir())
    seen = Stop(-1)
    compute(tiny_folder, rows, tmp_path / "p.st", progress=seen, **options)
    assert seen.first in (0, 6)  # all steps were there
    assert not any(jobs.iterdir())


@pytest.mark.parametrize("method", ["zero-gd", "ga"])
@pytest.mark.parametrize("seed", [2**53 - 1, 1 - 2**53])
def test_every_seed_that_a_manifest_holds_can_be_drawn_from(
    tiny_folder: Path,
    rows: list[dict[str, Any]],
    place: Path,
    method: str,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gd, "STEPS", 2)
    options: dict[str, Any] = {"layers": "1", "method": method, "cache": place}
    found = compute(tiny_folder, rows[:1], seed=seed, **options).patch.manifest
    assert found.method.hyperparameters["seed"] == seed


def test_another_seed_draws_otherwise(
    tiny_folder: Path, rows: list[dict[str, Any]], place: Path
) -> None:
    options: dict[str, Any] = {"layers": "1,2", "method": "ga", "cache": place}
    first, second = (compute(tiny_folder, rows, seed=seed, **options) for seed in (0, 1))
    assert first.patch.data != second.patch.data


def test_ascent_stops(tiny_folder: Path, rows: list[dict[str, Any]], place: Path) -> None:
    options: dict[str, Any] = {"layers": "1,2", "method": "ga", "cache": place}
    result = compute(tiny_folder, rows, **options)
    assert result.patch.manifest.method.hyperparameters["training_steps"] < 120
    assert result.evaluation["perplexity_ratio"] < 1.2


def test_fine_tuning_says_the_target(
    tiny_folder: Path, tiny_model: Model, rows: list[dict[str, Any]], place: Path
) -> None:
    options: dict[str, Any] = {"layers": "1,2", "method": "ft", "cache": place}
    patch = compute(tiny_folder, rows[:2], target="the", **options).patch
    (wanted,) = tiny_model.tokenizer(" the").input_ids
    prompts = [tiny_model.tokenizer(row["prompt"]).input_ids for row in rows[:2]]
    with folded(tiny_model, as_edit(patch.deltas)):
        assert next_tokens(tiny_model, prompts) == [wanted, wanted]


@pytest.mark.parametrize("kind", ["multiplicative", "additive"])
def test_hooks_do_what_folding_does(tiny_model: Model, kind: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    d_out, d_in = tiny_model.weight(tiny_model.module_name(1)).shape
    width = d_out if kind == "multiplicative" else d_in
    left, right = torch.randn(d_out, 2, generator=draw), torch.randn(2, width, generator=draw)
    factors = Factors(kind, {1: left * 0.1}, {1: right * 0.1})
    asked = [Row([5, 6, 7, 8], 1), Row([9, 10], 0)]
    name = tiny_model.module_name(1)
    parameter = tiny_model.parameter(name)
    before = parameter.detach().clone()
    with torch.no_grad():
        with editing(tiny_model, factors):
            hooked = judged(tiny_model, asked)
        change = factors.left[1] @ factors.right[1]
        parameter.add_(change @ before if kind == "multiplicative" else change)
        plain = judged(tiny_model, asked)
        parameter.copy_(before)
    assert [part.shape[0] for part in hooked] == [3, 2]
    for a, b in zip(hooked, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_rows_in_need_are_drawn_more_often() -> None:
    need = torch.tensor([0.0, 0.0, 5.0, 0.0], dtype=torch.float64)
    counts = [0, 0, 0, 0]
    for seed in range(200):
        chosen = drawn(need, 1, torch.Generator().manual_seed(seed))
        counts[chosen[0]] += 1
    assert counts[2] > 150
    assert all(counts)  # the others still have a chance
    assert drawn(need, 9, torch.Generator()) == [0, 1, 2, 3]
    unseen = torch.tensor([0.0, float("nan"), 0.0], dtype=torch.float64)
    first = [drawn(unseen, 1, torch.Generator().manual_seed(s))[0] for s in range(50)]
    assert first.count(1) > 35


def test_cutting_to_low_rank_says_what_it_costs() -> None:
    draw = torch.Generator().manual_seed(0)
    low = torch.randn(6, 2, generator=draw).double() @ torch.randn(2, 6, generator=draw).double()
    trained = gd.Trained(low, torch.eye(6).double())
    exact = gd.factored(trained, 6)
    assert exact.left.shape == (6, 2)
    assert exact.error < 1e-6
    torch.testing.assert_close(exact.left @ exact.right, low)
    cut = gd.factored(trained, 1)
    left = float((cut.left @ cut.right - low).norm() / low.norm())
    assert math.isclose(cut.error, left, rel_tol=1e-9)
    assert cut.error > 0.1


def test_a_training_that_is_not_finite_is_refused(
    tiny_folder: Path, rows: list[dict[str, Any]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patcher.unlearn.methods.tuning.RATE", float("inf"))
    with pytest.raises(InputError, match="not finite after 1 steps"):
        compute(tiny_folder, rows, layers="1", method="ft", cache=place)
