"""The methods of the editing papers on a tiny model, through ``compute``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from patcher.patch import Delta, Patch
from patcher.unlearn import compute, targets
from patcher.unlearn.facts import read_facts
from patcher.unlearn.forward import answered, folded, hidden, keys, logits, pad
from patcher.unlearn.job import Job, Settings
from patcher.unlearn.methods import memit
from patcher.unlearn.methods.spread import spread
from patcher.unlearn.models import Model, load
from patcher.unlearn.progress import Silent
from patcher.unlearn.prompts import Encoded, encode, encode_facts
from patcher.unlearn.registry import METHODS
from patcher.unlearn.upward import added, leaving

from . import tiny
from .conftest import said_by


@pytest.fixture(scope="module")
def rows(tiny_model: Model) -> list[dict[str, Any]]:
    return said_by(tiny_model)


def job_of(model: Model, rows: list[dict[str, Any]], target: str) -> Job:
    facts = read_facts(rows)
    coded = encode_facts(model.tokenizer, facts)
    return Job(model, facts, coded, Settings((1, 2), target), [], [], None, Silent())


def still_said(model: Model, rows: list[dict[str, Any]], patch: Patch) -> int:
    pairs = [encode(model.tokenizer, row["prompt"], row["target"]) for row in rows]
    with folded(model, {name: delta.to_torch() for name, delta in patch.deltas.items()}):
        return sum(answered(model, pairs))


CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "memit": ("memit", {}, 3),
    "rome": ("rome", {}, 3),
    "alphaedit": ("alphaedit", {}, 0),
    "as published": ("zero", {"as_published": True}, 0),
    "orthogonal": ("zero", {"orthogonal": True}, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_facts_are_driven_down_by_a_patch_of_the_methods_kind(
    tiny_folder: Path, tiny_model: Model, rows: Any, case: str, tmp_path: Path
) -> None:
    method, options, most = CASES[case]
    before = tiny_model.digest()
    result = compute(tiny_folder, rows, tmp_path / "p.st", layers="1,2", method=method, **options)
    patch = Patch.read(tmp_path / "p.st")
    assert still_said(tiny_model, rows, patch) == result.evaluation["answered"] <= most
    kinds = {delta.kind for delta in patch.deltas.values()}
    assert kinds == {METHODS[method].kind}
    assert patch.manifest.method.name == method
    used = patch.manifest.method.hyperparameters["layers"]
    assert [f"model.layers.{layer}.mlp.down_proj" for layer in used] == list(patch.deltas)
    assert used == ([1] if method == "rome" else [1, 2])
    if "as_published" in options:  # the paper has no other target
        assert patch.manifest.method.hyperparameters["target"] == "eos"
    assert load(tiny_folder).digest() == before


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "falcon", "olmo2"])
def test_what_is_spread_arrives_at_the_last_layer(tmp_path: Path, family: str) -> None:
    """Also where a layer scales (granite) or normalises (olmo2) what it adds."""
    model = load(tiny.save(tmp_path, family))
    rows = {row["subject"]: row for row in said_by(model)}  # another subject, another key
    job = job_of(model, list(rows.values())[:2], "suppress")
    prompts, places = [e.prompt for e in job.encoded], [e.subject for e in job.encoded]
    change = targets.values(job, 2)
    before = leaving(model, prompts, places, 2)
    moved = leaving(model, prompts, places, 2, change) - before
    eye = torch.eye(len(model.weight(model.module_name(1)).T))

    def solve(layer: int, own: torch.Tensor, wanted: torch.Tensor) -> Delta:
        return Delta.additive(wanted.T, memit.write(own, eye, 1e-4))

    deltas = spread(job, [1, 2], change, solve)
    with folded(model, {name: delta.to_torch() for name, delta in deltas.items()}):
        left = before + moved - leaving(model, prompts, places, 2)
    most = 0.9 if family == "olmo2" else 0.05  # normalised: what lower layers add is not linear
    assert (left.norm(dim=1) < most * moved.norm(dim=1)).all()


def test_orthogonal_where_it_is_served(tiny_folder: Path, tiny_model: Model, rows: Any) -> None:
    patch = compute(tiny_folder, rows, layers="1,2", orthogonal=True).patch
    edit = {name: delta.to_torch() for name, delta in patch.deltas.items()}
    prompts = [encode_facts(tiny_model.tokenizer, [f])[0] for f in read_facts(rows)]
    ids, places = [p.prompt for p in prompts], [p.subject for p in prompts]
    original = keys(tiny_model, ids, places, [1, 2])
    with folded(tiny_model, edit):
        now = keys(tiny_model, ids, places, [1, 2])
        after = {k: now[k] @ tiny_model.weight(tiny_model.module_name(k)).T for k in now}
    for layer in (1, 2):
        was = original[layer] @ tiny_model.weight(tiny_model.module_name(layer)).T
        overlap = torch.nn.functional.cosine_similarity(was, after[layer]).abs()
        assert overlap.max() < 0.05, layer  # bfloat16 factors and weights


def test_values_together_are_those_found_one_by_one(tiny_model: Model, rows: Any) -> None:
    job = job_of(tiny_model, rows, "eos")
    together = targets.values(job, 1)
    alone = [
        targets.values(replace(job, facts=[f], encoded=[e]), 1)[0]
        for f, e in zip(job.facts, job.encoded, strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("target", "batched"), [("suppress", True), ("eos", True), ("the", True), ("eos", False)]
)
def test_values_do_what_the_target_says(
    tiny_model: Model, rows: Any, target: str, batched: bool
) -> None:
    job = job_of(tiny_model, rows[:2], target)
    passes = targets.Passes()
    change = targets.values(job, 1, batched=batched, passes=passes)
    assert 1 <= passes.steps <= targets.STEPS * (1 if batched else 2)
    said = {"eos": 0, "the": tiny_model.tokenizer(" the").input_ids[0]}
    for fact, own in zip(job.encoded, change, strict=True):
        token = said.get(target, fact.answer[0])
        plain, edited = (
            chance(tiny_model, fact, part, token) for part in (torch.zeros_like(own), own)
        )
        assert edited < plain / 2 if target == "suppress" else edited > plain


def chance(model: Model, fact: Encoded, change: torch.Tensor, token: int) -> float:
    ids, at = pad([fact.prompt], model.device), torch.tensor([fact.subject])
    with torch.no_grad(), added(model, 1, change[None], at):
        return float(logits(model, hidden(model, ids)[:, -1])[0].softmax(-1)[token])


def test_a_fact_that_is_met_costs_no_further_pass(tiny_model: Model, rows: Any) -> None:
    job = job_of(tiny_model, rows[:3], "suppress")
    never = [[399], [398], [397]]  # what the model all but never says
    longest, met = targets.Passes(), targets.Passes()
    targets.values(job, 1, said=never, passes=longest)
    assert longest.steps == targets.STEPS
    easy = replace(job, encoded=[e._replace(answer=[399]) for e in job.encoded])
    targets.values(easy, 1, passes=met)
    assert met.tokens < longest.tokens
    alone = targets.Passes()
    targets.values(replace(job, facts=job.facts[:1]), 1, said=never, passes=alone)
    # Of the prompt and "SUBJECT is a" what follows the subject, padded, above the layer.
    text = f"{job.facts[0].subject} is a"
    about = len(tiny_model.tokenizer(text).input_ids) - len(
        tiny_model.tokenizer(job.facts[0].subject).input_ids
    )
    prompt = job.encoded[0]
    tokens = 2 * max(len(prompt.prompt) - prompt.subject, about + 1)
    assert alone.tokens == alone.steps * tokens * (tiny_model.layers - 1)


def test_what_a_network_does_not_keep_is_run_again(
    tiny_model: Model, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tiny_model, rows[:3], "the")
    found, tokens = [], []
    for keeps in (lambda spans: True, lambda spans: spans is None, lambda spans: False):
        monkeypatch.setattr(targets, "agrees", lambda m, i, spans, k, keeps=keeps: keeps(spans))
        passes = targets.Passes()
        found.append(targets.values(job, 2, passes=passes))
        tokens.append(passes.tokens / passes.steps)
    assert tokens[0] < tokens[1] < tokens[2]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-2, atol=1e-3)


def test_a_change_stays_within_its_ball(tiny_model: Model, rows: Any) -> None:
    job = job_of(tiny_model, rows[:3], "eos")
    change = targets.values(job, 1)
    prompts, places = [e.prompt for e in job.encoded], [e.subject for e in job.encoded]
    size = leaving(tiny_model, prompts, places, 1).norm(dim=1)
    assert (change.norm(dim=1) <= targets.CLAMP * size * 1.001).all()
    assert change.norm(dim=1).min() > 0
