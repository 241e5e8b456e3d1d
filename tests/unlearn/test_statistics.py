from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from patcher.errors import InputError, UsageError
from patcher.unlearn.facts import Fact
from patcher.unlearn.forward import inputs_of
from patcher.unlearn.layers import choose_layers
from patcher.unlearn.models import Model
from patcher.unlearn.progress import Silent
from patcher.unlearn.reference import (
    Probe,
    reference_text,
    same_wording,
    shipped_probes,
    windows,
    without,
)
from patcher.unlearn.statistics import moments, several_moments

SEQUENCES = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]


class Counting(Silent):
    started = 0

    def start(self, what: str, total: int | None) -> None:
        self.started += 1


def compute(
    model: Model, cache: Path | None, progress: Silent, at: list[int] | None = None
) -> dict[int, torch.Tensor]:
    return moments(model, SEQUENCES, at, [1, 2], cache=cache, progress=progress, what="x")


def test_a_moment_is_the_mean_over_all_tokens(tiny_model: Model) -> None:
    found = compute(tiny_model, None, Silent())
    rows = [inputs_of(tiny_model, [s], [1, 2]) for s in SEQUENCES]
    for layer in (1, 2):
        k = torch.cat([row[layer][0] for row in rows])
        torch.testing.assert_close(found[layer], k.T @ k / 10)


def test_a_moment_at_positions(tiny_model: Model) -> None:
    found = compute(tiny_model, None, Silent(), [4, 0, 1])
    k = torch.stack(
        [
            inputs_of(tiny_model, [s], [2])[2][0, p]
            for s, p in zip(SEQUENCES, [4, 0, 1], strict=True)
        ]
    )
    torch.testing.assert_close(found[2], k.T @ k / 3)


def test_several_moments_of_one_pass_are_those_of_a_pass_each(tiny_model: Model) -> None:
    at = [4, 0, 1]
    found = several_moments(tiny_model, SEQUENCES, [at, None], [1, 2], Silent(), "x")
    for both, chosen in zip(found, (at, None), strict=True):
        alone = compute(tiny_model, None, Silent(), chosen)
        assert all(torch.equal(both[layer], alone[layer]) for layer in (1, 2))


def test_moments_are_kept_and_damage_is_computed_again(tiny_model: Model, tmp_path: Path) -> None:
    count = Counting()
    first = compute(tiny_model, tmp_path, count)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    again = compute(tiny_model, tmp_path, count)
    assert all(torch.equal(again[layer], first[layer]) for layer in first)
    assert count.started == 1
    damages = [b"", b"x" * 100, files[0].read_bytes()[:-7]]
    flipped = bytearray(files[0].read_bytes())
    flipped[-40] ^= 1
    for turn, damage in enumerate([*damages, bytes(flipped)], 2):
        files[0].write_bytes(damage)
        again = compute(tiny_model, tmp_path, count)
        assert count.started == turn
        assert all(torch.equal(again[layer], first[layer]) for layer in first)
    assert sorted(tmp_path.iterdir()) == files  # nothing half-written is left


def test_other_positions_are_another_moment(tiny_model: Model, tmp_path: Path) -> None:
    compute(tiny_model, tmp_path, Silent())
    compute(tiny_model, tmp_path, Silent(), [0, 0, 0])
    assert len(list(tmp_path.iterdir())) == 4


def test_other_threads_are_another_moment(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute(tiny_model, tmp_path, Silent())
    # Only what is said of it: the sums themselves are computed as before.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    compute(tiny_model, tmp_path, Silent())
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(Model, "computed_on", ["cuda", None])
    compute(tiny_model, tmp_path, Silent())
    assert len(list(tmp_path.iterdir())) == 6


def test_a_cache_that_can_not_be_written_does_no_harm(tiny_model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert compute(tiny_model, tmp_path / "file", Silent()).keys() == {1, 2}


def test_what_ships(tiny_model: Model) -> None:
    probes = shipped_probes()
    assert len(probes) > 1000
    assert all(probe.subject in probe.prompt for probe in probes)
    assert len(reference_text(None)) > 50_000


def test_texts_that_can_not_be_read(tmp_path: Path) -> None:
    for name, data in (("empty", b" \n"), ("latin", b"caf\xe9")):
        (tmp_path / name).write_bytes(data)
    for path in (tmp_path / "missing", tmp_path / "empty", tmp_path / "latin", tmp_path):
        with pytest.raises(InputError):
            reference_text(path)


def test_a_forgotten_subject_is_never_preserved() -> None:
    probes = shipped_probes()
    subject = probes[5].subject
    fact = Fact("x", prompt=probes[5].prompt, subject=subject)
    assert not any(subject.casefold() in p.prompt.casefold() for p in without([fact], probes))
    alike = same_wording([fact], probes[:40], 30, seed=0)
    assert len(alike) == 30
    assert subject not in {probe.subject for probe in alike}
    assert alike == same_wording([fact], probes[:40], 30, seed=0)


def test_a_subject_is_found_where_no_spaces_set_words_apart() -> None:
    fact = Fact("法国", prompt="巴黎是哪国的首都?", subject="巴黎")
    named = Probe("我昨天到了巴黎市", "我")
    other = Probe("我昨天到了柏林", "我")
    assert without([fact], [named, other]) == [other]
    assert without([], [named, other]) == [named, other]


def test_a_mark_of_utf_8_is_no_part_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("The sea is calm.".encode("utf-8-sig"))
    assert reference_text(path) == "The sea is calm."


def test_windows(tiny_model: Model) -> None:
    pieces = windows(tiny_model.tokenizer, "word " * 500, 16, 41)
    assert [len(piece) for piece in pieces] == [16, 16, 9]


@pytest.mark.parametrize(
    ("depth", "chosen"), [(30, [3, 4, 5]), (12, [1, 2, 3]), (36, [4, 5, 6]), (2, [0, 1]), (1, [0])]
)
def test_automatic_layers_are_early_ones(depth: int, chosen: list[int]) -> None:
    assert choose_layers("auto", depth) == chosen


def test_layers_by_number() -> None:
    assert choose_layers("5, 3", 30) == [3, 5]
    assert choose_layers([0], 1) == [0]
    unreadable: list[Any] = ["", "x", "3,3", "1.5", [True], [1.0], []]
    for wrong in unreadable:
        with pytest.raises(UsageError):
            choose_layers(wrong, 30)
    outside: list[Any] = ["30", "-1", [3, 99]]
    for wrong in outside:
        with pytest.raises(UsageError, match="0 to 29"):
            choose_layers(wrong, 30)
