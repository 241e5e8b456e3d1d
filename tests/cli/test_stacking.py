"""``compute`` on top of a stack, through the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patcher.patch import Patch
from patcher.unlearn.models import load
from tests.cli.running import document, run, run_on
from tests.fake_engine import FakeEngine
from tests.unlearn import tiny
from tests.unlearn.conftest import said_by


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def facts(model: Path) -> list[dict[str, Any]]:
    return said_by(load(model))


@pytest.fixture
def words(
    tmp_path: Path, model: Path, facts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """A command that makes ``upper.st``; beside it lie ``lower.st`` and what that forgot."""
    monkeypatch.setenv("PATCHER_SALT_FILE", str(tmp_path / "salt"))
    monkeypatch.setenv("PATCHER_CACHE", str(tmp_path / "cache"))
    for name, part in (("lower", facts[:1]), ("upper", facts[1:2])):
        lines = (json.dumps(fact) + "\n" for fact in part)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    begin = ["compute", "--model", model, "--forget"]
    made = run(*begin, tmp_path / "lower.jsonl", "-o", tmp_path / "lower.st")
    assert made.exit_code == 0, made.output
    return [*begin, tmp_path / "upper.jsonl", "-o", tmp_path / "upper.st"]


def test_a_patch_on_top_of_another(words: list[object], tmp_path: Path) -> None:
    below = ["--on-top-of", tmp_path / "lower.st", "--keep-forgotten", tmp_path / "lower.jsonl"]
    result = run(*words, *below, PATCHER_ENGINE="http://127.0.0.1:9", PATCHER_TOKEN="x")
    assert result.exit_code == 0, result.output
    assert "still forgotten 1 of 1 (before 1)" in " ".join(result.stdout.split())
    lower, upper = (Patch.read(tmp_path / f"{name}.st") for name in ("lower", "upper"))
    assert upper.manifest.requires == (lower.id,)
    assert lower.id[:12] in run("inspect", tmp_path / "upper.st").stdout
    told = document(run("compare", tmp_path / "lower.st", tmp_path / "upper.st", "--json"))
    assert told["pairs"][0]["verdict"] == "on top of the other"


def test_a_patch_on_top_of_what_an_engine_has_in_force(
    words: list[object], fake: FakeEngine, tmp_path: Path
) -> None:
    run_on(fake, "apply", tmp_path / "lower.st")
    lower = Patch.read(tmp_path / "lower.st")
    assert run_on(fake, *words, "--engine", fake.url).exit_code == 0
    assert Patch.read(tmp_path / "upper.st").manifest.requires == (lower.id,)
    result = run_on(fake, *words, "--engine", fake.url, "--on-top-of", "ffffff", "--json")
    assert (result.exit_code, document(result)["error"]["code"]) == (6, "unknown-patch")
    assert run(*words, "--engine", "http://127.0.0.1:9", "--json").exit_code == 7


def test_what_can_not_lie_beneath(words: list[object], patch_file: Path, tmp_path: Path) -> None:
    lower = tmp_path / "lower.st"
    for more, code, name in (
        (["--on-top-of", "abcdef12"], 2, "usage"),
        (["--keep-forgotten", tmp_path / "lower.jsonl"], 2, "usage"),
        (["--on-top-of", patch_file], 4, "base-mismatch"),
        (["--on-top-of", lower, "--on-top-of", lower], 6, "stack-conflict"),
    ):
        result = run(*words, *more, "--json")
        assert (result.exit_code, document(result)["error"]["code"]) == (code, name), more
    assert not (tmp_path / "upper.st").exists()
