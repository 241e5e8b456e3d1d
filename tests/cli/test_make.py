"""``inspect``, and how ``compute`` and ``evaluate`` hand their options on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patcher.errors import UsageError
from patcher.evaluation.report import Count, EvaluationReport, Figures
from patcher.patch import Patch
from patcher.unlearn import Bars
from tests.cli.running import document, run
from tests.small_patch import MODULE, small_patch


class Result:
    """What computing gives, as far as the command reads it."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes, self.id = path, 1234, "ab" * 32
        self.facts, self.known, self.seconds = 5, 4, 2.5
        self.modules = {MODULE: 10}
        before_and_after = {"patched": 1, "base": 3, "of": 4}
        self.evaluation: dict[str, Any] = {
            "facts": 5,
            "answered": 0,
            "leaked": {"patched": 0, "base": 5, "tokens": 12},
            "paraphrases": before_and_after,
            "others_unchanged": {"same": 126, "of": 128},
            "preserved": {"patched": 0, "base": 0, "of": 0},
            "perplexity_ratio": 1.004,
        }

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "path": str(self.path), "seconds": float("nan")}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """What a stand-in for ``compute`` or ``evaluate`` was called with."""
    calls: dict[str, dict[str, Any]] = {}

    def compute(**wishes: Any) -> Result:
        calls["compute"] = wishes
        wishes["progress"].start("values", 2)
        wishes["progress"].step(2, "loss 0.12")
        wishes["progress"].finish()
        return Result(wishes["output"])

    def evaluate(**wishes: Any) -> EvaluationReport:
        calls["evaluate"] = wishes
        some, none = Count(1, 4), Count(0, 0)
        figures = Figures(some, some, some, none, 12.345678)
        return EvaluationReport(5, 4, figures, figures, none, None, (), "bfloat16")

    monkeypatch.setattr("patcher.unlearn.compute", compute)
    monkeypatch.setattr("patcher.evaluation.evaluate", evaluate)
    return calls.__getitem__


@pytest.fixture
def forget(tmp_path: Path) -> Path:
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "The mother tongue of Jane is", "target": "Welsh"}\n')
    return path


def test_inspect_shows_a_sound_file_whole(patch_file: Path) -> None:
    patch = small_patch()
    told = document(run("inspect", patch_file, "--json"))
    assert (told["id"], told["bytes"], told["sound"]) == (patch.id, len(patch.data), True)
    assert told["manifest"] == patch.manifest.model_dump(mode="json")
    module = told["modules"][MODULE]
    delta = patch.deltas[MODULE]
    assert module["norm"] == pytest.approx(delta.norm)
    assert module["spectral_norm"] == pytest.approx(delta.spectral_norm)
    assert module["gain"] == pytest.approx(delta.gain)
    assert (module["kind"], module["rank"], module["dtype"]) == ("multiplicative", 2, "F32")
    assert module["shape"] == [8, 12]


def test_inspect_says_for_people_what_is_in_it(patch_file: Path) -> None:
    result = run("inspect", patch_file)
    assert result.exit_code == 0
    assert "sound" in result.stdout
    assert small_patch().id in result.stdout
    assert MODULE in result.stdout
    assert f"{small_patch().deltas[MODULE].gain:.4g}" in result.stdout


def test_inspect_takes_an_evaluation_that_says_nothing(tmp_path: Path) -> None:
    patch = small_patch()
    told = patch.manifest.model_copy(update={"evaluation": {"bars": {}}})
    Patch.build(told, patch.deltas).write(tmp_path / "p.st")
    assert run("inspect", tmp_path / "p.st").exit_code == 0


def test_compute_hands_its_options_on(
    asked: Callable[[str], dict[str, Any]], forget: Path, tmp_path: Path
) -> None:
    output = tmp_path / "p.st"
    words = ["compute", "--model", "m", "--forget", forget, "-o", output, "--layers", "9,10,11"]
    more = ["--target", "eos", "--known-only", "--limit", 5, "--seed", 7, "--device", "cpu"]
    result = run(*words, *more, "--json")
    assert result.exit_code == 0
    wishes = asked("compute")
    wishes.pop("progress")
    assert wishes == {
        "model": "m", "forget": forget, "output": output, "method": "zero", "layers": "9,10,11",
        "dtype": "auto", "target": "eos", "known_only": True, "limit": 5, "seed": 7,
        "device": "cpu", "as_published": False, "orthogonal": False, "augment": False,
        "resume": True, "ignore_memory": False, "bars": Bars(),
    }  # fmt: skip
    assert document(result) == {"id": "ab" * 32, "path": str(output), "seconds": None}


def test_compute_is_silent_in_a_pipe_and_talks_with_v(
    asked: Callable[[str], dict[str, Any]], forget: Path, tmp_path: Path
) -> None:
    words = ["compute", "--model", "m", "--forget", forget, "-o", tmp_path / "p.st"]
    assert run(*words).stderr == ""
    result = run(*words, "-v", "--json")
    assert "loss 0.12" in result.stderr
    assert document(result)["id"]


def test_compute_says_for_people_what_was_forgotten_and_what_it_cost(
    asked: Callable[[str], dict[str, Any]], forget: Path, tmp_path: Path
) -> None:
    words = ["compute", "--model", "m", "--forget", forget, "-o", tmp_path / "p.st"]
    shown = " ".join(run(*words).stdout.split())
    assert "still answered 0 of 5" in shown
    assert "other wordings 1 of 4 (before 3)" in shown
    assert "others unchanged 126 of 128" in shown
    assert "perplexity +0.40 %" in shown
    assert "preserved" not in shown


def test_evaluate_hands_its_options_on(
    asked: Callable[[str], dict[str, Any]], forget: Path, patch_file: Path
) -> None:
    words = ["evaluate", "--model", "m", "--forget", forget, "--patch", patch_file]
    result = run(*words, "--retain", forget, "--ppl", forget, "--dtype", "float16")
    assert result.exit_code == 0
    wishes = asked("evaluate")
    assert wishes["patches"] == (patch_file,)
    assert (wishes["retain"], wishes["ppl"], wishes["dtype"]) == (forget, forget, "float16")
    assert "25.0 % (1 of 4)" in result.stdout
    assert "12.346" in result.stdout
    assert "–" in result.stdout


def test_what_was_measured_is_shown_where_the_page_can_not_be_written(
    asked: Callable[[str], dict[str, Any]],
    forget: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise UsageError("Can't write it: no room.", "Make room.")

    monkeypatch.setattr("patcher.evaluation.write_page", full)
    words = ["evaluate", "--model", "m", "--forget", forget, "--report", tmp_path / "page.html"]
    result = run(*words)
    assert result.exit_code == 2
    assert "25.0 % (1 of 4)" in result.stdout
    assert result.stderr == "error: Can't write it: no room.\nMake room.\n"
    result = run(*words, "--json")
    assert result.exit_code == 2
    assert document(result)["facts"] == 5


def test_a_page_that_has_no_place_is_told_before_anything_is_measured(
    asked: Callable[[str], dict[str, Any]], forget: Path, tmp_path: Path
) -> None:
    words = ["evaluate", "--model", "m", "--forget", forget]
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "nowhere" / "page.html", tmp_path / "pipe"):
        result = run(*words, "--report", place)
        assert result.exit_code == 2
        assert str(place) in result.stderr
    with pytest.raises(KeyError):
        asked("evaluate")


def test_the_forget_set_has_to_exist(tmp_path: Path) -> None:
    result = run("compute", "--model", "m", "--forget", tmp_path / "none", "-o", tmp_path / "p")
    assert result.exit_code == 2
