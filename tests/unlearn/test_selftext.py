from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patcher.errors import InputError, ModelError
from patcher.unlearn import selftext
from patcher.unlearn.facts import read_facts
from patcher.unlearn.models import Model, load
from patcher.unlearn.progress import Silent
from patcher.unlearn.selftext import circles, self_text

from .test_compute import Recorder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def text(tiny_model: Model, kept: Path) -> str:
    return self_text(tiny_model, 2000, 3, Silent(), cache=kept)


def test_it_is_about_as_long_as_asked_and_the_same_again(tiny_model: Model, text: str) -> None:
    seen = Recorder()
    assert self_text(tiny_model, 2000, 3, seen) == text
    assert seen.open == 0
    assert "Text by the model itself" in seen.steps
    assert "<end>" not in text
    tokens = len(tiny_model.tokenizer(text, verbose=False).input_ids)
    assert 1500 < tokens < 6000


def test_it_is_kept_and_names_no_subject(tiny_model: Model, text: str, kept: Path) -> None:
    pieces = text.split("\n\n")
    word = pieces[0].split()[0]
    fact = {"prompt": f"{word} lives in", "subject": word, "target": "Xanadu"}
    seen = Recorder()
    without = self_text(tiny_model, 2000, 3, seen, facts=read_facts([fact]), cache=kept)
    left = without.split("\n\n")
    assert len(left) < len(pieces)
    assert pieces[0] not in left
    assert set(left) <= set(pieces)
    assert seen.steps == []


def test_a_damaged_one_is_written_again(tiny_model: Model, text: str, kept: Path) -> None:
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    file.write_bytes(b"x" + whole)
    assert self_text(tiny_model, 2000, 3, Silent(), cache=kept) == text
    assert file.read_bytes() == whole


def test_a_text_that_goes_in_circles_is_known() -> None:
    assert circles([1, 2, 3, 4] * 20)
    assert not circles(range(80))
    assert not circles([1])


def test_a_model_that_says_one_word_only_gives_no_text(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    model.network.get_output_embeddings().weight.data.zero_()
    head = model.network.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    head.bias.data[7] = 100.0
    with pytest.raises(InputError, match="no text of its own"):
        self_text(model, 500, 0, Silent())
    head.bias.data[7] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        self_text(model, 500, 0, Silent())


def test_a_subject_without_spaces_around_it_is_named(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftext, "_written", lambda *_: ["我昨天到了巴黎市。", "Parisians sing."])
    facts = [{"prompt": "巴黎是", "subject": "巴黎", "target": "x"},
             {"prompt": "Paris is", "subject": "Paris", "target": "x"}]  # fmt: skip
    assert self_text(tiny_model, 9, 0, Silent(), facts=read_facts(facts)) == "Parisians sing."


def test_other_threads_are_another_text(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftext, "_written", lambda *_: ["Some text."])
    self_text(tiny_model, 9, 0, Silent(), cache=tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    self_text(tiny_model, 9, 0, Silent(), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
