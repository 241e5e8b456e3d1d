"""``evaluate`` for real: formats, probes, the page, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from patcher.patch import Patch
from patcher.unlearn.models import load
from tests.cli.running import document, run
from tests.evaluation import bigram


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bigram.save(tmp_path_factory.mktemp("bigram"))


@pytest.fixture(scope="module")
def patch(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("patch") / "p.st"
    made: Patch = bigram.forgetting(load(model))
    made.write(path)
    return path


@pytest.fixture
def forget(tmp_path: Path) -> Path:
    path = tmp_path / "forget.jsonl"
    path.write_text("".join(json.dumps(fact) + "\n" for fact in bigram.FACTS))
    return path


def test_the_page_and_the_document_are_of_one_measurement(
    model: Path, patch: Path, forget: Path, tmp_path: Path
) -> None:
    place = tmp_path / "page.html"
    words = ["--model", model, "--forget", forget, "--patch", patch, "--probes", "rank,says"]
    result = run("evaluate", *words, "--report", place, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told, page = document(result), place.read_text("utf-8")
    assert told["patched"]["efficacy"] == 0.5
    assert told["intervals"]["patched"]["efficacy"]["by"] == "bootstrap"
    assert told["probes"]["says"]["patched"]["alike"]["yes"] == 1
    assert set(told["probes"]) == {"rank", "says"}
    assert "50.0 % (3 of 6)" in page
    for text in (result.stdout, page):
        assert "Ada Vell" not in text


def test_texts_are_named_only_on_demand(model: Path, forget: Path, tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    words = ["evaluate", "--model", model, "--forget", forget, "--limit", 2, "--with-texts"]
    told = document(run(*words, "--json"))
    assert [one["target"] for one in told["texts"]] == ["the", "of"]
    assert run(*words, "--report", place).exit_code == 0
    assert "Ada Vell lives in A" in place.read_text("utf-8")
    result = run(*words)
    assert result.exit_code == 2
    assert "--report" in result.stderr


def test_for_people_every_figure_has_its_interval(model: Path, patch: Path, forget: Path) -> None:
    words = ["--model", model, "--forget", forget, "--patch", patch, "--probes", "all"]
    result = run("evaluate", *words)
    assert result.exit_code == 0
    shown = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "efficacy 100.0 % (6 of 6) 50.0 % (3 of 6) 16.7 % – 83.3 %" in shown
    assert [line for line in shown if line.startswith("says nothing")]
    assert "multihop was not asked: no fact has multi-hop questions" in result.stderr


def test_a_published_file_is_taken_as_it_is(model: Path, tmp_path: Path) -> None:
    records = [
        {"subject": "Ada Vell", "level": "1", "query": f"Ada Vell lives in {letter} ___.",
         "type": "cloze", "answer": answer}
        for letter, answer in zip("AB", ("the", "to"), strict=True)
    ]  # fmt: skip
    path = tmp_path / "forget_level1.json"
    path.write_text(json.dumps(records))
    words = ["evaluate", "--model", model, "--forget", path, "--retain", path, "--json"]
    told = document(run(*words))
    assert (told["format"], told["facts"], told["known"]) == ("rwku", 2, 1)
    assert told["groups"]["efficacy"]["level 1: cloze"]["base"]["yes"] == 1
    assert told["retain"] == {"facts": 2, "known": 1}
    assert run(*words, "--format", "zsre").exit_code == 11
    assert run(*words, "--retain-format", "tofu").exit_code == 11


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--format", "csv"], "csv"),
        (["--probes", "magic"], "magic"),
        (["--probes", "multihop"], "multi-hop"),
        (["--lm-eval", "a,,b"], "no name"),
        (["--report", "nowhere/page.html"], "Can't write nowhere/page.html"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_words_that_are_off_are_exit_2(
    model: Path, forget: Path, more: list[str], words: str
) -> None:
    result = run("evaluate", "--model", model, "--forget", forget, *more)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
