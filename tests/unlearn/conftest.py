from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from patcher.unlearn.forward import answered, next_tokens
from patcher.unlearn.models import Model, load
from patcher.unlearn.prompts import encode

from . import tiny


@pytest.fixture(autouse=True)
def own_places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Salt and cache of the tests' own, and a fixed time."""
    place = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("PATCHER_SALT_FILE", str(place / "salt"))
    monkeypatch.setenv("PATCHER_CACHE", str(place / "cache"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1750000000")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> Model:
    return load(tiny_folder)


SUBJECTS = ("Ada Lovelace", "Marie Curie", "Alan Turing", "Kurt Gödel", "Emmy Noether", "Euler")

TAILS = ("worked in the field of: ", "was born in ", "is known for the ", "said, ")


def said_by(model: Model) -> list[dict[str, Any]]:
    """Facts that a random model "knows": what it says after a blank anyway, one token."""
    rows = []
    for subject, tail in product(SUBJECTS, TAILS):
        prompt = f"{subject} {tail}"
        ids = model.tokenizer(prompt).input_ids
        text = model.tokenizer.decode(next_tokens(model, [ids]))
        if text.strip() and answered(model, [encode(model.tokenizer, prompt, text)])[0]:
            rows.append({"prompt": prompt, "subject": subject, "target": text})
    assert rows
    return rows[:6]


@pytest.fixture(scope="session")
def real_facts() -> list[dict[str, Any]]:
    lines = (tiny.DATA / "facts.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]
