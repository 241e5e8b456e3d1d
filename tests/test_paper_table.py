"""bench/paper_table.py end to end on a tiny random model, and what it averages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.unlearn import tiny

sys.path.insert(0, str(REPOSITORY / "bench"))
import paper_table

from patcher.unlearn.forward import next_tokens
from patcher.unlearn.models import load


def record(number: int) -> dict[str, object]:
    """One of MCF's records, with two paraphrases and two neighbours."""
    subject = f"Person {number}"
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": "{} was born in",
            "relation_id": "P19",
            "target_new": {"str": "Rome"},
            "target_true": {"str": "Paris"},
            "subject": subject,
        },
        "paraphrase_prompts": [f"{subject} comes from", f"The home of {subject} is"],
        "neighborhood_prompts": ["Ada was born in", "Kurt was born in"],
    }


@pytest.fixture
def mcf(tmp_path: Path) -> Path:
    path = tmp_path / "multi_counterfact.json"
    path.write_text(json.dumps([record(i) for i in range(12)]), "utf-8")
    return path


def test_the_table_is_made_end_to_end_and_patches_are_kept(
    tmp_path: Path,
    mcf: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATCHER_SALT_FILE", str(tmp_path / "salt"))
    monkeypatch.setenv("PATCHER_CACHE", str(tmp_path / "cache"))
    model = tiny.save(tmp_path / "tiny")
    capsys.readouterr()  # of the library that writes the model
    words = ["--models", str(model), "--mcf", str(mcf), "--zsre", str(mcf), "--samples", "2"]
    words += ["--seeds", "1", "2", "--methods", "memit", "zero --as-published"]
    words += ["--characters", "400", "--patches", str(tmp_path / "patches")]
    assert paper_table.main(words) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "### tiny, mcf, 2 samples, 2 seeds" in said.out
    for name in ("base", "memit", "zero --as-published"):
        cells = [line for line in said.out.splitlines() if line.startswith(f"| {name} |")]
        assert len(cells) == 2  # one a dataset
        assert all("±" in cell for line in cells for cell in line.split("|")[2:6])
    assert "paper:" not in said.out  # it has no such model
    assert len(list((tmp_path / "patches").glob("*.st"))) == 4  # two methods, two seeds


def test_facts_are_of_the_second_half_and_a_seeds_own() -> None:
    rows = [{"prompt": str(i)} for i in range(100)]
    first, again, other = (paper_table.drawn(rows, 10, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert all(int(row["prompt"]) >= 50 for row in first)
    assert len(paper_table.drawn(rows, 1000, 1)) == 50


def test_shares_are_of_whole_answers_or_of_tokens(tmp_path: Path) -> None:
    model = load(tiny.save(tmp_path / "tiny"))
    prompt = "Ada was born in "
    ids = model.tokenizer(prompt).input_ids
    first = model.tokenizer.decode(next_tokens(model, [ids])).strip()
    facts = [[(prompt, first + " and something else that it would not say")], []]
    whole = paper_table.share(model, facts, False)
    tokens = paper_table.share(model, facts, True)
    assert whole == 0.0
    assert tokens is not None
    assert 0.0 <= tokens < 100.0
    assert paper_table.share(model, [[]], True) is None


def test_the_papers_figures_stand_beside_its_own_models_alone() -> None:
    one = {"base": [paper_table.Figures(1.0, 2.0, 3.0, None)]}
    table = paper_table.table("meta-llama/Llama-3.2-3B-Instruct", "mcf", 50, one)
    assert "| base | 1.00±0.00 | 2.00±0.00 | 3.00±0.00 | – | 18.20±3.84 |" in table
    assert "arXiv 2605.18879" in table
    assert "18.20" not in paper_table.table("meta-llama/Llama-3.2-3B-Instruct", "mcf", 10, one)
    assert "18.20" not in paper_table.table("Qwen/Qwen3-4B", "mcf", 50, one)
