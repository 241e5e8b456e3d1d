"""``compare``: what it prints, and how it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from patcher.unlearn import compute
from patcher.unlearn.models import load
from tests.cli.running import document, run
from tests.small_patch import MODULE, small_patch
from tests.unlearn import tiny
from tests.unlearn.conftest import said_by


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.st" for name in "abc"]
    for seed, path in enumerate(paths):
        small_patch(seed).write(path)
    return paths


def test_every_pair_is_told(three: list[Path]) -> None:
    told = document(run("compare", *three, "--json"))
    ids = [small_patch(seed).id for seed in range(3)]
    assert [(one["id"], one["path"]) for one in told["patches"]] == [
        (one, str(path)) for one, path in zip(ids, three, strict=True)
    ]
    assert told["metric"] == "euclidean"
    assert [(p["first"], p["second"]) for p in told["pairs"]] == [
        (ids[0], ids[1]), (ids[0], ids[2]), (ids[1], ids[2]),
    ]  # fmt: skip
    for pair in told["pairs"]:
        assert 0 <= pair["interference"] <= 1
        assert pair["modules"][MODULE]["overlap"] == pair["interference"]


def test_for_people_the_worst_pair_comes_first_with_what_it_means(three: list[Path]) -> None:
    result = run("compare", *three)
    assert result.exit_code == 0
    rows = [
        line.split() for line in result.stdout.splitlines() if line.startswith(("a.st", "b.st"))
    ]
    shares = [float(next(word for word in row if word.startswith("0."))) for row in rows]
    assert len(rows) == 3
    assert shares == sorted(shares, reverse=True)
    assert "act on" in result.stdout
    assert "--model" in result.stderr


def test_wrong_files(three: list[Path], tmp_path: Path) -> None:
    assert run("compare", three[0]).exit_code == 2
    assert run("compare").exit_code == 2
    result = run("compare", three[0], three[0], "--json")
    assert (result.exit_code, document(result)["error"]["code"]) == (2, "usage")
    (tmp_path / "bad.st").write_bytes(b"not a patch")
    assert run("compare", three[0], tmp_path / "bad.st").exit_code == 3


def test_without_a_model_no_torch_is_loaded(three: list[Path]) -> None:
    script = (
        f"import sys; sys.argv = ['patcher', 'compare', {str(three[0])!r}, {str(three[1])!r}]\n"
        "from patcher.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_under_a_models_statistics(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHER_SALT_FILE", str(tmp_path / "salt"))
    monkeypatch.setenv("PATCHER_CACHE", str(tmp_path / "cache"))
    folder = tiny.save(tmp_path / "model")
    rows = said_by(load(folder))
    paths = [tmp_path / "x.st", tmp_path / "y.st"]
    for row, path in zip(rows, paths, strict=False):
        compute(folder, [row], path)
    told = document(run("compare", *paths, "--model", folder, "--json"))
    assert told["metric"] == "statistics"
    assert 0 <= told["pairs"][0]["interference"] <= 1
    kept = sorted((tmp_path / "cache").iterdir())
    assert document(run("compare", *paths, "--model", folder, "--json")) == told
    assert sorted((tmp_path / "cache").iterdir()) == kept
    plain = document(run("compare", *paths, "--json"))
    assert plain["pairs"][0]["interference"] != told["pairs"][0]["interference"]
    result = run("compare", *three[:2], "--model", folder, "--json")
    assert (result.exit_code, document(result)["error"]["code"]) == (4, "base-mismatch")
