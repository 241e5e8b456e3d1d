"""``compute`` with bars and bad input, through the command: exit codes and documents."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from patcher.patch import Patch
from patcher.unlearn import memory
from tests.cli.running import COMMAND, document, environment, run
from tests.cli.test_compute_and_evaluate import compute, facts, forget, model, own_places

__all__ = ["facts", "forget", "model", "own_places"]  # fixtures


def test_bars_that_hold_are_exit_0_and_in_the_document(
    model: Path, forget: Path, tmp_path: Path
) -> None:
    result = compute(model, forget, tmp_path / "p.st", "--max-efficacy", "0")
    assert (result.exit_code, result.stderr) == (0, "")
    told = document(result)
    assert told["met"] is True
    assert told["bars"] == {"max_efficacy": {"bar": 0.0, "value": 0.0, "met": True}}


def test_a_missed_bar_is_exit_12_with_a_document_a_file_and_words(
    model: Path, forget: Path, tmp_path: Path
) -> None:
    output = tmp_path / "p.st"
    words = ["--max-efficacy", 0, "--max-ppl-ratio", "1e-6", "--method", "zero", "--orthogonal"]
    result = compute(model, forget, output, *words)
    assert result.exit_code == 12
    told = document(result)
    assert told["met"] is False
    assert told["bars"]["max_ppl_ratio"]["met"] is False
    assert told["id"] == Patch.read(output).id
    assert "max_ppl_ratio 1e-06 with" in result.stderr
    assert "max_efficacy" not in result.stderr
    assert len(result.stderr.splitlines()) == 2  # the cause, the cure
    inspected = document(run("inspect", output, "--json"))
    assert inspected["manifest"]["evaluation"]["bars"] == told["bars"]


def test_a_missed_bar_is_told_to_people_too(model: Path, forget: Path, tmp_path: Path) -> None:
    words = ["--model", model, "--forget", forget, "-o", tmp_path / "p.st", "--orthogonal"]
    result = run("compute", *words, "--max-ppl-ratio", "1e-6")
    assert result.exit_code == 12
    shown = " ".join(result.stdout.split())
    assert "max-ppl-ratio 1e-06" in shown
    assert "MISSED" in shown


@pytest.mark.parametrize(
    "more",
    [
        ["--max-efficacy", "1.5"],
        ["--max-ppl-ratio", "0"],
        ["--min-specificity", "nan"],
        ["--min-retained", "0.9"],
        ["--method", "memit", "--as-published"],
        ["--as-published", "--orthogonal"],
        ["--reference", "no-such-file"],
        ["--retain", "no-such-file"],
    ],
    ids=" ".join,
)
def test_bars_and_options_that_are_off_are_exit_2(
    model: Path, forget: Path, tmp_path: Path, more: list[str]
) -> None:
    result = compute(model, forget, tmp_path / "p.st", *more)
    assert result.exit_code == 2, result.output
    assert document(result)["error"]["code"] == "usage"
    assert not (tmp_path / "p.st").exists()


def test_what_is_forgotten_and_retained_is_exit_11(
    model: Path, forget: Path, tmp_path: Path
) -> None:
    result = compute(model, forget, tmp_path / "p.st", "--retain", forget)
    assert result.exit_code == 11
    assert document(result)["error"]["code"] == "bad-forget-set"


def test_too_little_memory_is_exit_11_with_the_figures(
    model: Path, forget: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1000)
    result = compute(model, forget, tmp_path / "p.st")
    assert result.exit_code == 11
    error = document(result)["error"]
    assert error["code"] == "not-enough-memory"
    assert "--ignore-memory" in error["cure"]


def test_verbose_shows_the_condition_numbers(model: Path, forget: Path, tmp_path: Path) -> None:
    words = ["--model", model, "--forget", forget, "-o", tmp_path / "p.st"]
    done = run("compute", *words, "-v")
    assert done.exit_code == 0
    assert re.search(r"Condition of what is preserved: .*\de\+\d\d", done.stderr)


def test_an_unknown_fact_is_a_line_on_stderr(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "unknown.jsonl"
    path.write_text(json.dumps({"prompt": "Ada Lovelace lived in", "target": "London"}) + "\n")
    words = ["--model", str(model), "--forget", str(path), "-o", str(tmp_path / "p.st")]
    done = subprocess.run(
        [*COMMAND, "compute", *words, "--layers", "1"],
        capture_output=True,
        text=True,
        env=environment(
            {name: os.environ[name] for name in ("PATCHER_SALT_FILE", "PATCHER_CACHE")}
        ),
    )
    assert done.returncode == 0
    assert done.stderr.strip() == (
        "the model doesn't know 1 of the 1 facts; --known-only leaves such out"
    )


def test_methods_are_listed_without_torch() -> None:
    listed = document(run("methods", "--json"))["methods"]
    names = [entry["name"] for entry in listed]
    assert names[0] == "zero"
    assert {"memit", "rome", "alphaedit"} <= set(names)
    assert all({"summary", "source", "cost", "needs", "kind"} <= set(entry) for entry in listed)
    shown = run("methods").stdout
    assert all(f"method  {name}" in shown for name in names)
    script = (
        "import sys; sys.argv = ['patcher', 'methods']\n"
        "from patcher.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip() == "False"
