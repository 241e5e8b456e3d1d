"""Input that can't be computed with, or only just: errors that say where, and warnings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from patcher.errors import (
    ForgetSetError,
    NotEnoughMemoryError,
    NumericalError,
    PatcherError,
    UsageError,
)
from patcher.unlearn import compute, memory
from patcher.unlearn.models import Model, load
from patcher.unlearn.progress import Silent
from patcher.unlearn.stability import steadied
from patcher.unlearn.statistics import moments

from . import tiny
from .conftest import said_by

FACT = {"prompt": "Ada Lovelace lived in", "subject": "Ada Lovelace", "target": "London"}


@pytest.fixture(scope="module")
def rows(tiny_model: Model) -> list[dict[str, Any]]:
    return said_by(tiny_model)


def refused(folder: Path, error: type[PatcherError], *facts: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        compute(folder, list(facts), **options)
    for word in ("Lovelace", "London"):
        assert word not in str(caught.value)
    return str(caught.value)


def test_unknown_facts_are_counted(
    tiny_folder: Path, rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "patcher"):
        compute(tiny_folder, [rows[0], FACT])
    assert "doesn't know 1 of the 2 facts" in caplog.text
    assert "Lovelace" not in caplog.text
    caplog.clear()
    compute(tiny_folder, [rows[0], FACT], known_only=True)
    assert "know" not in caplog.text


def test_a_fact_to_be_forgotten_and_retained_is_refused(tiny_folder: Path) -> None:
    same = {**FACT, "prompt": "ada  lovelace lived in", "target": " london "}
    same["subject"] = "ada"
    said = refused(tiny_folder, ForgetSetError, FACT, retain=[FACT | {"target": "Rome"}, same])
    assert "line 1" in said
    assert "line 2 of the retained" in said


def test_a_fact_that_is_anothers_neighbour_is_refused(tiny_folder: Path) -> None:
    other = {"prompt": "Marie Curie lived in", "subject": "Marie Curie", "target": "Paris"}
    near = {"locality": FACT["prompt"], "locality_target": FACT["target"]}
    said = refused(tiny_folder, ForgetSetError, FACT, other | near)
    assert "line 1: to be forgotten, and to stay as the locality of line 2" in said


def test_two_answers_to_one_prompt_are_warned_of(
    tiny_folder: Path, rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    result = compute(tiny_folder, [rows[0], rows[0] | {"target": "zebra"}])
    assert "1 prompt has more than one answer" in caplog.text
    assert result.evaluation["answered"] == 0


def test_a_subject_that_is_not_in_the_prompt_is_guessed_with_a_warning(
    tiny_folder: Path, rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    compute(tiny_folder, [rows[0] | {"subject": "Somebody Else"}])
    assert "line 1: subject does not stand in the prompt" in caplog.text
    assert "Somebody" not in caplog.text


@pytest.mark.parametrize("field", ["prompt", "rephrase", "locality"])
def test_what_is_longer_than_the_context_is_refused_by_its_line(
    tiny_folder: Path, rows: Any, field: str
) -> None:
    wrong = {**FACT, "locality": "It is", "locality_target": "so"}
    wrong[field] = "Ada Lovelace lived in " * 100
    said = refused(tiny_folder, ForgetSetError, rows[0], wrong)
    assert "line 2" in said
    assert "256" in said


def test_a_target_that_is_to_be_forgotten_is_refused(tiny_folder: Path) -> None:
    assert "line 1" in refused(tiny_folder, UsageError, FACT, target="london ")


def test_a_target_of_no_tokens_is_refused(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patcher.unlearn.choosing import check_target_tokens

    check_target_tokens(tiny_model.tokenizer, "eos")

    class Deaf:
        eos_token_id = None

        def __call__(self, *_: Any, **__: Any) -> Any:
            return type("Ids", (), {"input_ids": []})

    for target, word in (("abc", "no tokens"), ("eos", "no end of text")):
        with pytest.raises(PatcherError, match=word):
            check_target_tokens(Deaf(), target)


@pytest.mark.parametrize("form", ["as_published", "orthogonal"])
def test_forms_of_zero_are_refused_for_other_methods(tiny_folder: Path, form: str) -> None:
    options: dict[str, Any] = {form: True}
    assert "memit" in refused(tiny_folder, UsageError, FACT, method="memit", **options)


@pytest.mark.parametrize("seed", [2**53, -(2**53), 10**30])
def test_a_seed_that_no_manifest_holds_is_refused_before_anything_is_read(seed: int) -> None:
    with pytest.raises(UsageError, match="seed"):
        compute("/no/such/model", [FACT], seed=seed)


def test_what_would_fail_at_the_end_is_told_before_the_model_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "nowhere" / "p.st"
    for place, why in ((output, "nowhere"), (tmp_path, "folder")):
        with pytest.raises(UsageError, match=f"Can't write .*{why}"):
            compute("/no/such/model", [FACT], place)
    (tmp_path / "salt").write_text("no salt")
    for name, value in (("SOURCE_DATE_EPOCH", "x"), ("PATCHER_SALT_FILE", str(tmp_path / "salt"))):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            with pytest.raises(UsageError, match=r"SOURCE_DATE_EPOCH|salt"):
                compute("/no/such/model", [FACT])


def test_a_short_reference_text_is_warned_of(
    tiny_folder: Path, rows: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Once upon a time.")
    result = compute(tiny_folder, rows[:1], reference=text)
    assert "fewer than an output has directions (32)" in caplog.text
    condition = result.patch.manifest.method.hyperparameters["condition"]
    assert set(condition) == {
        str(n) for n in result.patch.manifest.method.hyperparameters["layers"]
    }
    assert all(value > 1 for value in condition.values())


def test_a_reference_of_one_token_is_refused(tiny_folder: Path, rows: Any, tmp_path: Path) -> None:
    text = tmp_path / "one.txt"
    text.write_text("a")
    with pytest.raises(PatcherError, match="no two tokens"):
        compute(tiny_folder, rows[:1], reference=text)


def moment_of(model: Model, tokens: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(tokens, 64, generator=draw)
    return data.T @ data / tokens


def test_the_condition_number_is_that_of_the_outputs(tiny_model: Model) -> None:
    moment = moment_of(tiny_model, 500)
    found, condition = steadied(tiny_model, 1, moment)
    assert torch.equal(found, moment)
    W = tiny_model.weight(tiny_model.module_name(1)).double()
    wanted = torch.linalg.cond(W @ moment.double() @ W.T)
    assert condition == pytest.approx(float(wanted), rel=0.01)


def test_a_ridge_is_raised_where_directions_were_hardly_seen(
    tiny_model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    moment = moment_of(tiny_model, 24)  # of 32 directions
    found, condition = steadied(tiny_model, 1, moment)
    assert condition <= 1e12
    assert "condition number" in caplog.text
    change = (found - moment).diagonal()
    assert 0 < change.mean() <= 0.011 * moment.diagonal().mean()


def test_too_few_directions_are_refused(tiny_model: Model) -> None:
    with pytest.raises(NumericalError, match="5 of the 32 directions of layer 1"):
        steadied(tiny_model, 1, moment_of(tiny_model, 5))


def test_statistics_that_are_not_finite_are_refused_by_their_layer(tiny_model: Model) -> None:
    moment = moment_of(tiny_model, 100)
    moment[3, 3] = float("nan")
    with pytest.raises(NumericalError, match="statistics of layer 2"):
        steadied(tiny_model, 2, moment)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, rows: Any, value: float
) -> None:
    folder = tiny.save(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        compute(folder, rows[:1])


def test_activations_that_overflow_are_refused(tmp_path: Path, rows: Any) -> None:
    folder = tiny.save(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e30
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="not finite"):
        compute(folder, rows[:1])


def test_values_that_are_not_finite_are_refused(
    tiny_folder: Path, rows: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from patcher.unlearn.methods import zero

    def broken(seen: Any, *_: Any, **__: Any) -> Any:
        return {layer: value + torch.nan for layer, value in seen.start().items()}

    monkeypatch.setattr(zero, "least_change", broken)
    with pytest.raises(NumericalError, match="not finite"):
        compute(tiny_folder, rows[:1], tmp_path / "p.st")
    assert not (tmp_path / "p.st").exists()


def test_a_singular_system_is_refused(
    tiny_folder: Path, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patcher.unlearn.methods import zero

    def singular(*_: Any, **__: Any) -> Any:
        return torch.linalg.solve(torch.zeros(2, 2), torch.ones(2))

    monkeypatch.setattr(zero, "least_change", singular)
    with pytest.raises(NumericalError, match="singular"):
        compute(tiny_folder, rows[:1], layers="1")


def test_memory_is_predicted_before_anything_is_loaded(
    tiny_folder: Path, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Model:
        raise AssertionError

    monkeypatch.setattr(memory, "available", lambda: 2**20)
    with monkeypatch.context() as within:
        within.setattr("patcher.unlearn.pipeline.load", never)
        with pytest.raises(NotEnoughMemoryError, match=r"0\.6 GiB .* 0\.0 GiB are free"):
            compute(tiny_folder, rows[:1])
    assert compute(tiny_folder, rows[:1], ignore_memory=True).facts == 1


def test_what_is_needed_grows_with_weights_and_layers(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    need = memory.needed(tiny_folder, 1)
    assert need.weights == 4 * sum(p.numel() for p in model.network.parameters())
    assert memory.needed(tiny_folder, 3).statistics > need.statistics
    assert need.total >= need.weights + need.batch


def test_a_gpu_without_room_for_the_moments_is_refused(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = memory.needed(tiny_folder)
    free = need.weights + need.batch + need.summed
    monkeypatch.setattr(memory, "available", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    memory.enough(need, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free - 1, free))
    with pytest.raises(NotEnoughMemoryError, match="on cuda"):
        memory.enough(need, torch.device("cuda"))


def test_what_is_free_is_told_here() -> None:
    free = memory.available()
    assert free is not None
    assert free > 2**20


def test_a_system_that_does_not_tell_its_memory_refuses_nothing(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: None)
    memory.enough(memory.needed(tiny_folder), torch.device("cpu"))


def test_moments_are_as_before_where_all_is_well(tiny_model: Model) -> None:
    made: Callable[..., Any] = moments
    found = made(
        tiny_model, [list(range(1, 90))], None, [1], cache=None, progress=Silent(), what="x"
    )[1]
    steady, _ = steadied(tiny_model, 1, found)
    assert torch.equal(steady, found)
