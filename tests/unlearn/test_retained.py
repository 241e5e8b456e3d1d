"""What the owner names is held to what the model says of it now."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from patcher.unlearn.choosing import Chosen
from patcher.unlearn.facts import read_facts
from patcher.unlearn.forward import as_edit, folded, hidden, logits, pad
from patcher.unlearn.job import Job, Settings
from patcher.unlearn.methods.zero import zero
from patcher.unlearn.models import Model
from patcher.unlearn.preparing import prepare
from patcher.unlearn.progress import Silent
from patcher.unlearn.prompts import encode_facts
from patcher.unlearn.reference import reference_text
from patcher.unlearn.retaining import retain_terms

from .conftest import said_by


@pytest.fixture
def job(tiny_model: Model, tmp_path: Path) -> Job:
    """A fact to be forgotten, four to be retained, one of them a chat."""
    rows: list[dict[str, Any]] = said_by(tiny_model)
    facts = read_facts(rows[:1])
    encoded = encode_facts(tiny_model.tokenizer, facts)
    chosen = Chosen(facts, encoded, [True], 1, 1)
    chat = {"messages": [{"role": "user", "content": "Who was Gauss?"}], "subject": "Gauss"}
    kept = read_facts([*rows[2:5], {**chat, "target": "A man"}])
    settings = Settings((1, 2), text_tokens=2048)
    text = reference_text(None)
    return prepare(tiny_model, chosen, settings, text, kept, tmp_path, Silent())[0]


def moved(asked: Job, computed: Job) -> float:
    """Nats by which one job's edit moves what is said to the other's prompts, on average."""
    before = said(asked)
    with folded(computed.model, as_edit(zero(computed).deltas)):
        after = said(asked)
    return float((after - before).gather(1, before.argmax(1, keepdim=True)).abs().mean())


def said(job: Job) -> torch.Tensor:
    """Log-probabilities of the next token after each of the retained prompts."""
    model = job.model
    with torch.no_grad():
        last = [hidden(model, pad([e.prompt], model.device))[0, -1:] for e in job.retained]
        return logits(model, torch.cat(last)).log_softmax(-1)


def test_what_is_said_of_it_moves_less_for_being_named(job: Job) -> None:
    assert len(job.retained) == 4
    alone = replace(job.settings, guards=0, guards_apart=0, guard=1000.0)
    named = replace(job, settings=alone, augmented=(), reworded=())
    unnamed = replace(named, retained=())
    assert moved(job, named) < 0.7 * moved(job, unnamed)


def test_what_is_trained_is_held_to_it_too(job: Job) -> None:
    kept = [row.ids for row in retain_terms(job, 1.0, 1.0)[0].rows]
    assert all(one.prompt in kept for one in job.retained)


def test_a_prompt_to_be_forgotten_is_not_held_to_its_answer(
    job: Job, tiny_model: Model, tmp_path: Path
) -> None:
    fact = job.facts[0]
    row = {"prompt": fact.prompt, "subject": fact.subject, "target": "another answer"}
    chosen = Chosen(job.facts, job.encoded, [True], 1, 1)
    kept, text = read_facts([row]), reference_text(None)
    made, _ = prepare(tiny_model, chosen, job.settings, text, kept, tmp_path, Silent())
    assert made.retained == []
