"""lm-evaluation-harness: refused where it is not installed, run for real where it is."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from patcher.errors import UsageError
from patcher.evaluation import evaluate
from patcher.evaluation.general import checked
from patcher.patch import Patch

from . import bigram

INSTALLED = find_spec("lm_eval") is not None


def test_no_task_needs_no_harness() -> None:
    assert checked([]) == []


@pytest.mark.parametrize("tasks", [[""], ["a", " "]])
def test_a_task_has_a_name(tasks: list[str]) -> None:
    with pytest.raises(UsageError, match="no name"):
        checked(tasks)


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_without_the_harness_it_is_said_before_anything_is_loaded() -> None:
    with pytest.raises(UsageError, match="not installed"):
        evaluate("no model at all", forget=bigram.FACTS, lm_eval=["arc_easy"])


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task of the harness on a file: two of three questions about forgotten facts."""
    rows = [
        {"q": "Ada Vell lives in A", "choices": ["the", "of"], "a": 0},
        {"q": "Bo Lint lives in B", "choices": ["the", "of"], "a": 1},
        {"q": "Dov Orr lives in D", "choices": ["to", "of"], "a": 0},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "homes.yaml"
    path.write_text(
        f"""task: homes
dataset_path: json
dataset_kwargs:
  data_files: {tmp_path / "rows.jsonl"}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{a}}}}"
metric_list:
  - metric: acc
"""
    )
    return path


@pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_task_is_run_on_both_sets_of_weights(
    bigram_folder: Path, forgetting: Patch, task: Path
) -> None:
    found = evaluate(
        bigram_folder, patches=[forgetting], forget=bigram.FACTS, lm_eval=[str(task)]
    ).lm_eval
    assert found is not None
    assert found["base"]["homes"]["acc"] == 1.0
    assert found["patched"]["homes"]["acc"] < 1.0


@pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed")
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_a_wrong_word(bigram_folder: Path) -> None:
    with pytest.raises(UsageError, match="lm_eval failed"):
        evaluate(bigram_folder, forget=bigram.FACTS, lm_eval=["no_such_task_anywhere"])
