"""``compute`` and ``evaluate`` for real, on a tiny random model, through the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from patcher.unlearn.models import load
from tests.cli.running import document, run
from tests.unlearn import tiny
from tests.unlearn.conftest import said_by


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def facts(model: Path) -> list[dict[str, Any]]:
    return said_by(load(model))


@pytest.fixture(autouse=True)
def own_places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("PATCHER_SALT_FILE", str(place / "salt"))
    monkeypatch.setenv("PATCHER_CACHE", str(place / "cache"))


@pytest.fixture
def forget(tmp_path: Path, facts: list[dict[str, Any]]) -> Path:
    path = tmp_path / "forget.jsonl"
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts[:2]))
    return path


def compute(model: Path, forget: Path, output: Path, *more: object) -> Any:
    return run("compute", "--model", model, "--forget", forget, "-o", output, *more, "--json")


def test_compute_evaluate_and_inspect_tell_the_same_story(
    model: Path, forget: Path, tmp_path: Path
) -> None:
    output = tmp_path / "p.st"
    result = compute(model, forget, output)
    assert result.exit_code == 0
    assert result.stderr == ""
    computed = document(result)
    assert {"id", "path", "bytes", "modules", "facts", "known", "seconds"} <= set(computed)
    assert (computed["path"], computed["bytes"]) == (str(output), output.stat().st_size)
    assert computed["facts"] == computed["known"] == 2

    inspected = document(run("inspect", output, "--json"))
    assert inspected["id"] == computed["id"]
    assert {n: m["rank"] for n, m in inspected["modules"].items()} == computed["modules"]

    words = ["--model", model, "--forget", forget, "--patch", output, "--retain", forget]
    result = run("evaluate", *words, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    measured = document(result)
    figures = {"efficacy", "generalization", "specificity", "retained", "perplexity"}
    assert set(measured["base"]) == set(measured["patched"]) == figures
    assert measured["base"]["efficacy"] == measured["base"]["retained"] == 1.0
    answered = computed["evaluation"]["answered"] / 2
    assert measured["patched"]["efficacy"] == measured["patched"]["retained"] == answered
    assert measured["base"]["perplexity"] is None


def test_all_wrong_lines_of_a_forget_set_are_told_at_once(model: Path, tmp_path: Path) -> None:
    forget = tmp_path / "wrong.jsonl"
    lines = ['{"prompt": "The sky is"}', '{"prompt": "a b", "target": "c"}', "{", '{"target": 3}']
    forget.write_text("\n".join(lines) + "\n")
    result = compute(model, forget, tmp_path / "p.st")
    assert result.exit_code == 11
    error = document(result)["error"]
    assert error["code"] == "bad-forget-set"
    for number, wrong in ((1, True), (2, False), (3, True), (4, True)):
        assert (f"line {number}" in error["message"].lower()) is wrong, error["message"]
    assert "sky" not in result.output
    assert not (tmp_path / "p.st").exists()


@pytest.mark.parametrize("kind", ["no such folder", "empty folder", "damaged weights"])
def test_an_unusable_model_is_exit_11(model: Path, forget: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    if kind != "no such folder":
        folder.mkdir()
    if kind == "damaged weights":
        for file in model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "model.safetensors").write_bytes(b"not weights")
    result = compute(folder, forget, tmp_path / "p.st")
    assert result.exit_code == 11, result.output
    assert document(result)["error"]["code"] == "bad-model"


def test_a_patch_of_another_base_is_exit_4(model: Path, forget: Path, patch_file: Path) -> None:
    words = ["--model", model, "--forget", forget, "--patch", patch_file]
    result = run("evaluate", *words, "--json")
    assert result.exit_code == 4, result.output
    assert document(result)["error"]["code"] == "base-mismatch"


@pytest.mark.parametrize(
    "more",
    [
        ["--layers", "99"],
        ["--method", "magic"],
        ["--layers", "x"],
        ["--target", " "],
        ["--title", "a\x1b[2J"],
        ["--title", "x" * 1025],
        ["--seed", str(2**53)],
    ],
)
def test_options_that_are_off_are_exit_2(
    model: Path, forget: Path, tmp_path: Path, more: list[str]
) -> None:
    result = compute(model, forget, tmp_path / "p.st", *more)
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "p.st").exists()


def test_a_place_that_can_not_be_written_is_told_before_the_model_is_looked_at(
    forget: Path, tmp_path: Path
) -> None:
    result = compute(tmp_path / "no model", forget, tmp_path / "nowhere" / "p.st")
    assert result.exit_code == 2
    assert str(tmp_path / "nowhere" / "p.st") in document(result)["error"]["message"]


def test_a_float16_checkpoint_is_measured_as_it_is_computed_for(tmp_path: Path) -> None:
    folder, forget = tiny.save(tmp_path / "half", dtype=torch.float16), tmp_path / "f.jsonl"
    forget.write_text(json.dumps(said_by(load(folder))[0]) + "\n")
    assert compute(folder, forget, tmp_path / "p.st", "--layers", "1").exit_code == 0
    words = ["evaluate", "--model", folder, "--forget", forget]
    measured = run(*words, "--patch", tmp_path / "p.st", "--json")
    assert measured.exit_code == 0, measured.output
    assert document(measured)["dtype"] == "float16"
    assert document(run(*words, "--json"))["dtype"] == "float16"
