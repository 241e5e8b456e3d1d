from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from patcher.unlearn import compute
from patcher.unlearn.facts import read_facts
from patcher.unlearn.forward import answered
from patcher.unlearn.job import Job, Settings
from patcher.unlearn.models import Model, load
from patcher.unlearn.progress import Silent
from patcher.unlearn.prompts import encode_facts
from patcher.unlearn.reference import reference_text, shipped_probes, windows, without
from patcher.unlearn.tracing import Choice, choose_by_evidence

from . import tiny
from .conftest import said_by

Row = dict[str, Any]


def job_of(model: Model, rows: list[Row]) -> Job:
    facts = read_facts(rows)
    text = windows(model.tokenizer, reference_text(None), 128, 2048)
    coded = encode_facts(model.tokenizer, facts)
    probes = without(facts, shipped_probes())[:200]
    settings = Settings((0,), window=128)
    return Job(model, facts, coded, settings, text, probes, None, Silent())


def chosen(model: Model, rows: list[Row]) -> Choice:
    job = job_of(model, rows)
    said = answered(model, [(fact.prompt, fact.answer) for fact in job.encoded])
    return choose_by_evidence(job, said)


def silenced(folder: Path, but: int, family: str) -> Model:
    """A random model whose only MLP that does anything is that layer's."""
    model = load(tiny.save(folder, family))
    for layer in range(model.layers):
        if layer != but:
            for parameter in model.module(layer).parameters():
                parameter.data.zero_()
    return model


@pytest.mark.parametrize(("family", "layer"), [("llama", 0), ("llama", 2), ("gpt2", 1), ("opt", 2)])
def test_the_one_layer_that_knows_anything_is_found(
    tmp_path: Path, family: str, layer: int
) -> None:
    model = silenced(tmp_path, layer, family)
    found = chosen(model, said_by(model))
    assert (found.layers, found.by) == ((layer,), "evidence")
    assert found.moved[(layer,)] < float("inf") == found.moved[(3,)]


def test_the_choice_is_the_same_again_and_none_of_the_settings(tiny_model: Model) -> None:
    job = job_of(tiny_model, said_by(tiny_model))
    known = [True] * len(job.facts)
    first = choose_by_evidence(job, known)
    again = choose_by_evidence(replace(job, settings=replace(job.settings, layers=(3,))), known)
    assert first == again
    assert list(first.layers) == list(range(first.layers[0], first.layers[-1] + 1))
    assert first.moved[first.layers] <= 1.1 * min(first.moved.values())


def test_what_the_model_does_not_know_is_no_evidence(tiny_folder: Path, tiny_model: Model) -> None:
    unknown = [{"prompt": "Ada Lovelace was born in", "target": "zebra crossing"}]
    job = job_of(tiny_model, unknown)
    assert choose_by_evidence(job, [False]).by == "depth"
    used = compute(tiny_folder, unknown).patch.manifest.method.hyperparameters
    assert (used["layers"], used["layers_by"]) == ([0, 1, 2], "depth")


def test_the_manifest_says_how_the_layers_were_found(tiny_folder: Path, tiny_model: Model) -> None:
    rows = said_by(tiny_model)
    used = compute(tiny_folder, rows).patch.manifest.method.hyperparameters
    job = job_of(tiny_model, rows)
    assert used["layers_by"] == "evidence"
    assert used["layers"]
    assert len(used["layers"]) <= job.model.layers
    asked = compute(tiny_folder, rows, layers="2").patch.manifest.method.hyperparameters
    assert (asked["layers"], asked["layers_by"]) == ([2], "choice")
