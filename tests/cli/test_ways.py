"""``export`` and ``import``: what they print, and how they fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patcher.patch import Patch
from tests.cli.running import document, run
from tests.export.making import down, network, patch_on, sharded, written
from tests.unlearn import tiny

KINDS = {down(1): "multiplicative", down(2): "additive"}


@pytest.fixture(autouse=True)
def own_salt(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHER_SALT_FILE", str(tmp_path_factory.getbasetemp() / "salt"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), dtype=torch.float32)


@pytest.fixture
def paths(tmp_path: Path, model: Path) -> list[Path]:
    """Two patches of the model, for float32 as it is stored."""
    return [
        written(patch_on(network(model), KINDS, seed), tmp_path / f"{seed}.st") for seed in (0, 1)
    ]


def ids(paths: list[Path]) -> list[str]:
    return [Patch.read(path).id for path in paths]


def test_an_adapter_and_back(tmp_path: Path, model: Path, paths: list[Path]) -> None:
    adapter, again = tmp_path / "adapter", tmp_path / "again.st"
    told = document(run("export", *paths, "--peft", adapter, "--model", model, "--json"))
    assert (told["kind"], told["path"]) == ("peft", str(adapter))
    assert (told["patches"], told["rank"]) == (ids(paths), 6)
    assert told["modules"] == dict.fromkeys(KINDS, 6)
    told = document(
        run("import", "--peft", adapter, "--model", model, "-o", again, "--dtype", "float32",
            "--title", "back", "--json")
    )  # fmt: skip
    assert (told["id"], told["path"]) == (ids([again])[0], str(again))
    assert told["bytes"] == again.stat().st_size
    assert Patch.read(again).manifest.title == "back"
    for one in told["modules"].values():
        assert (one["kind"], one["rank"]) == ("additive", 6)
        assert 0 <= one["error"] < 1e-5
        assert 0 <= one["rounded_error"] < 1e-5


def test_a_checkpoint_and_back(tmp_path: Path, model: Path, paths: list[Path]) -> None:
    merged, again = tmp_path / "merged", tmp_path / "again.st"
    told = document(run("export", paths[0], "--checkpoint", merged, "--model", model, "--json"))
    assert (told["kind"], told["path"]) == ("checkpoint", str(merged))
    assert (told["patches"], told["modules"]) == (ids(paths[:1]), list(KINDS))
    assert told["bytes"] == sum(file.stat().st_size for file in merged.iterdir())
    assert told["left_out"] == []
    told = document(
        run("import", "--diff", model, merged, "-o", again, "--dtype", "float32", "--json")
    )
    assert {name: one["kind"] for name, one in told["modules"].items()} == KINDS
    capped = ("import", "--diff", model, merged, "-o", again, "--rank", 2, "--dtype", "float32")
    told = document(run(*capped, "--json"))
    assert {one["rank"] for one in told["modules"].values()} == {2}


def test_for_people(tmp_path: Path, model: Path, paths: list[Path]) -> None:
    base = sharded(tmp_path / "base", model)
    (base / "pytorch_model.bin").write_bytes(b"old")
    result = run("export", *paths, "--checkpoint", tmp_path / "merged", "--model", base, "-v")
    assert result.exit_code == 0
    assert "pytorch_model.bin" in result.stdout
    assert "as they were before" in result.stderr
    assert "folding" in result.stderr
    result = run("export", *paths, "--peft", tmp_path / "adapter", "--model", base)
    assert "rank" in result.stdout
    result = run("import", "--diff", base, tmp_path / "merged", "-o", tmp_path / "p.st", "-v",
                 "--rank", 1)  # fmt: skip
    assert result.exit_code == 0
    assert down(1) in result.stdout
    assert "more than half is lost" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["export", "P", "--model", "M"],
        ["export", "P", "--peft", "OUT", "--checkpoint", "OUT2", "--model", "M"],
        ["export", "P", "--checkpoint", "OUT"],
        ["export", "P", "--peft", "OUT"],
        ["export", "--peft", "OUT"],
        ["export", "P", "--peft", "M", "--model", "M"],
        ["import", "-o", "OUT"],
        ["import", "--peft", "M", "-o", "OUT"],
        ["import", "--diff", "M", "M", "--model", "M", "-o", "OUT"],
        ["import", "--peft", "M", "--model", "M", "--diff", "M", "M", "-o", "OUT"],
        ["import", "--peft", "M", "--model", "M", "--rank", "3", "-o", "OUT"],
        ["import", "--diff", "M", "M", "--rank", "0", "-o", "OUT"],
        ["import", "--diff", "M", "M"],
    ],
    ids=" ".join,
)
def test_wrong_words(tmp_path: Path, model: Path, paths: list[Path], words: list[str]) -> None:
    places = {"P": paths[0], "M": model, "OUT": tmp_path / "out", "OUT2": tmp_path / "out2"}
    result = run(*[places.get(word, word) for word in words], "--json")
    assert (result.exit_code, document(result)["error"]["code"]) == (2, "usage")
    assert not (tmp_path / "out").exists()


def test_the_exit_codes(tmp_path: Path, model: Path, paths: list[Path]) -> None:
    def code(*words: object) -> int:
        return run(*words).exit_code

    out = tmp_path / "out"
    other = tiny.save(tmp_path / "other", dtype=torch.float32, seed=6)
    (tmp_path / "bad.st").write_bytes(b"not a patch")
    assert code("export", tmp_path / "bad.st", "--peft", out) == 3
    assert code("export", paths[0], "--checkpoint", out, "--model", other) == 4
    assert code("export", paths[0], paths[0], "--checkpoint", out, "--model", model) == 6
    assert code("export", paths[0], "--checkpoint", out, "--model", tmp_path) == 11
    assert code("import", "--peft", model, "--model", model, "-o", out) == 11
    assert code("import", "--diff", model, model, "-o", out) == 11
    assert not out.exists()
