"""``plan`` and ``replace`` as commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import document, run_on
from tests.fake_engine import FakeEngine
from tests.small_patch import small_patch


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{seed}.st" for seed in range(3)]
    for seed, path in enumerate(found):
        small_patch(seed, f"edit {seed}").write(path)
    return found


def test_a_plan_tells_what_would_be_and_changes_nothing(
    fake: FakeEngine, paths: list[Path]
) -> None:
    assert run_on(fake, "apply", paths[0]).exit_code == 0
    told = document(run_on(fake, "plan", paths[1], paths[2], "--json"))
    ids = [small_patch(seed, f"edit {seed}").id for seed in range(3)]
    assert told["stack"] == ids
    pairs = {(one["first"], one["second"]) for one in told["interference"]}
    assert pairs == {(ids[0], ids[1]), (ids[0], ids[2]), (ids[1], ids[2])}
    assert all(0 <= one["interference"] <= 1 for one in told["interference"])
    shown = run_on(fake, "plan", paths[1])
    assert "Nothing was done." in shown.stdout
    assert "Is this meant?" in shown.stderr
    assert fake.stack == [ids[0]]
    assert set(fake.held) == {ids[0]}


def test_a_plan_that_would_be_refused_exits_as_the_refusal_would(
    fake: FakeEngine, paths: list[Path]
) -> None:
    run_on(fake, "apply", paths[0])
    refused = run_on(fake, "plan", paths[0], "--json")
    assert refused.exit_code == 6
    assert document(refused)["refusals"][0]["code"] == "already-applied"
    shown = run_on(fake, "plan", paths[0])
    assert "is there." in shown.stderr
    assert "It would be refused; nothing was done." in shown.stdout


def test_one_patch_takes_the_place_of_others(fake: FakeEngine, paths: list[Path]) -> None:
    ids = [small_patch(seed, f"edit {seed}").id for seed in range(3)]
    run_on(fake, "apply", paths[0], paths[1])
    done = run_on(fake, "replace", ids[0][:12], "--by", paths[2], "--reason", "v2", "--json")
    assert document(done)["stack"] == [ids[2], ids[1]]
    assert fake.entries[-1]["detail"]["reason"] == "v2"
    assert document(run_on(fake, "replace", "--all", "--by", paths[0], "--json"))["stack"] == [
        ids[0]
    ]


@pytest.mark.parametrize(("words", "code"), [
    (("--all", "--by", "{1}"), 6),
    (("--by", "{1}"), 2),
    (("{id0}", "--all", "--by", "{1}"), 2),
    (("ffff", "--by", "{1}"), 6),
    (("{id0}", "--by", "{0}"), 6),
    (("{id0}",), 2),
])  # fmt: skip
def test_a_replacement_that_makes_no_sense(
    fake: FakeEngine, paths: list[Path], words: tuple[str, ...], code: int
) -> None:
    if words[0] != "--all":
        run_on(fake, "apply", paths[0])
    before = list(fake.stack)
    filled = [word.format(*paths, id0=small_patch(0, "edit 0").id) for word in words]
    assert run_on(fake, "replace", *filled).exit_code == code
    assert fake.stack == before
