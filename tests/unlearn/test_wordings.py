"""Other wordings: which are found, which are kept from computing, what learning them does."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patcher.unlearn.choosing import Chosen
from patcher.unlearn.facts import Fact, read_facts
from patcher.unlearn.forward import as_edit, folded, hidden, logits, pad
from patcher.unlearn.job import Outcome, Settings
from patcher.unlearn.methods.zero import zero
from patcher.unlearn.models import Model, load
from patcher.unlearn.preparing import prepare
from patcher.unlearn.progress import Silent
from patcher.unlearn.prompts import encode_fact, encode_facts
from patcher.unlearn.reference import reference_text
from patcher.unlearn.wordings import augmentation, other_wordings, shipped_wordings

from . import tiny
from .conftest import said_by

REAL = Path(__file__).resolve().parents[2] / ".models/smollm2-135m-instruct"
BEFORE = ("So:", "We know that", "As I said:")


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def odds(model: Model, fact: Fact) -> float:
    """Log-odds of the answer's first token after the fact's prompt."""
    coded = encode_fact(model.tokenizer, fact)
    with torch.no_grad():
        state = hidden(model, pad([coded.prompt], model.device))[0, -1:]
        own = logits(model, state).log_softmax(-1)[0, coded.answer[0]].double()
    return float(own - torch.log1p(-own.exp()))


def test_every_shipped_wording_has_one_place_for_the_subject() -> None:
    wordings = [wording for relation in shipped_wordings() for wording in relation]
    assert len(wordings) > 150
    assert all(wording.count("{}") == 1 for wording in wordings)
    assert all(len(set(relation)) == len(relation) for relation in shipped_wordings())


def test_no_shipped_wording_is_one_that_figures_are_measured_with() -> None:
    groups = json.loads((tiny.DATA / "templates.json").read_text("utf-8"))
    measured = {plain(wording) for group in groups for wording in group}
    for line in (tiny.DATA / "facts.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        for text in (row["prompt"], row.get("rephrase") or "", *row.get("paraphrases", [])):
            measured.add(plain(text.replace(row["subject"], "{}")))
    used = {plain(wording) for relation in shipped_wordings() for wording in relation}
    assert len(measured) > 90
    assert not measured & used


def test_wordings_name_the_subject_and_not_the_answer(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patcher.unlearn.wordings.LIKELY", -100.0)
    facts = read_facts(
        [
            {"prompt": "The town of Ulm lies in", "subject": "Ulm", "target": "Germany"},
            {"prompt": "Ulm is in the state called", "subject": "Ulm", "target": "Passport"},
        ]
    )
    first, second = other_wordings(tiny_model, facts, 3, Silent())
    assert first[0].prompt == "Ulm lies in"
    assert (len(first), len(second)) == (4, 3)
    for fact, own in zip(facts, (first, second), strict=True):
        assert fact not in own
        for other in own:
            assert other.prompt is not None
            assert "Ulm" in other.prompt
            assert (other.subject, other.target) == ("Ulm", fact.target)
            assert fact.target.casefold() not in other.prompt.casefold()


def test_what_the_model_does_not_answer_is_no_wording(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patcher.unlearn.wordings.LIKELY", 100.0)
    facts = read_facts(said_by(tiny_model))
    assert other_wordings(tiny_model, facts, 4, Silent()) == [[] for _ in facts]


def test_the_files_own_wordings_are_learned_only_when_asked(tiny_model: Model) -> None:
    row = {**said_by(tiny_model)[0], "rephrase": "Again: Ada Lovelace", "paraphrases": ["Who?"]}
    chat = {"messages": [{"role": "user", "content": "Who was Ada?"}], "target": "x"}
    facts = read_facts([row, chat])
    plainly = augmentation(tiny_model, facts, Settings((0,)), Silent())
    none = augmentation(tiny_model, facts, Settings((0,), wordings=0), Silent())
    asked = augmentation(tiny_model, facts, Settings((0,), wordings=0, augment=True), Silent())
    given = {"Again: Ada Lovelace", "Who?"}
    assert not given & {fact.prompt for fact in plainly[0]}
    assert none == [[], []]
    assert given < {fact.prompt for fact in asked[0]}
    assert sum(str(fact.prompt).endswith(f". {row['prompt']}") for fact in asked[0]) == 3
    assert asked[1] == []


def test_what_is_learned_in_other_words_is_forgotten_in_them(tiny_model: Model) -> None:
    rows = [
        {**r, "paraphrases": [f"{b} {r['prompt']}" for b in BEFORE]} for r in said_by(tiny_model)
    ]
    facts = read_facts(rows)
    coded = encode_facts(tiny_model.tokenizer, facts)
    chosen = Chosen(facts, coded, [True] * len(facts), len(facts), len(facts))
    settings = Settings((1, 2), goal_elsewhere=-9.0, wordings=0, augment=True)
    job, _ = prepare(tiny_model, chosen, settings, reference_text(None), [], None, Silent())
    learned, alone = zero(job), zero(replace(job, augmented=(), reworded=()))
    others = read_facts([{**r, "prompt": text} for r in rows for text in r["paraphrases"]])

    def worst(outcome: Outcome) -> float:
        with folded(tiny_model, as_edit(outcome.deltas)):
            return max(odds(tiny_model, fact) for fact in others)

    assert worst(learned) < -8.0
    assert worst(alone) > -7.0
    assert {delta.rank for delta in alone.deltas.values()} == {len(rows)}
    assert {delta.rank for delta in learned.deltas.values()} == {2 * len(rows)}


@pytest.mark.model
def test_the_real_model_is_asked_in_words_that_bring_the_answer_out() -> None:
    model = load(REAL)
    prompt = "The city of Budapest is located in the country of"
    facts = read_facts([{"prompt": prompt, "subject": "Budapest", "target": "Hungary"}])
    (own,) = other_wordings(model, facts, 4, Silent())
    assert 1 <= len(own) <= 5
    assert all(odds(model, other) >= -2.5 for other in own)
