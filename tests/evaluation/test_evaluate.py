from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from patcher.errors import BaseMismatchError, ForgetSetError, InputError, UsageError
from patcher.evaluation import evaluate
from patcher.evaluation.perplexity import cut, perplexity
from patcher.patch import Base, Delta, Manifest, Method, Patch, Requests, module_base
from patcher.unlearn.forward import next_tokens
from patcher.unlearn.interference import statistics_of
from patcher.unlearn.models import Model, load
from tests.unlearn import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder)


def says(model: Model, prompt: str) -> str:
    ids = model.tokenizer(prompt).input_ids
    text: str = model.tokenizer.decode(next_tokens(model, [ids]))
    return text


@pytest.fixture(scope="module")
def facts(model: Model) -> list[dict[str, Any]]:
    """One fact that the model knows (what it says after a blank), and one that it doesn't."""
    prompt = "The city of Rome lies in the land of "
    said = says(model, prompt)
    assert said.strip()
    known = {
        "prompt": prompt, "subject": "Rome", "target": said,
        "rephrase": "Rome, and so on ", "paraphrases": ["In Rome "],
        "locality": prompt.replace("Rome", "Oslo"),
        "locality_target": says(model, prompt.replace("Rome", "Oslo")),
    }  # fmt: skip
    return [known, {"prompt": "Nobody knows", "target": "zebra crossing", "subject": "Nobody"}]


def patch_of(model: Model, scale: float, layer: int = 1) -> Patch:
    """A patch that scales a module's output by ``1 + scale``, nearly: rank one by one."""
    name = model.module_name(layer)
    manifest = Manifest(
        title="scale",
        base=Base(
            model="m", architecture="a", modules={name: module_base(model.served(name))}
        ),
        method=Method(name="test", hyperparameters={}),
        requests=Requests(count=1, commitment="0" * 64),
    )  # fmt: skip
    eye = torch.eye(32)
    return Patch.build(manifest, {name: Delta.multiplicative(scale * eye, eye)})


def test_figures_and_counts_without_a_patch(folder: Path, facts: list[dict[str, Any]]) -> None:
    report = evaluate(folder, forget=facts)
    assert (report.facts, report.known) == (2, 1)
    assert report.base == report.patched
    assert report.base.efficacy.fraction == 0.5
    document = report.as_dict()
    assert document["base"]["specificity"] == 1.0
    assert document["base"]["retained"] is None
    assert document["base"]["perplexity"] is None
    assert document["counts"]["base"]["generalization"]["of"] == 2
    json.dumps(document)


def test_what_is_only_measured_needs_no_subject(folder: Path, facts: Any) -> None:
    elsewhere = [{**row, "subject": "Czechia"} for row in facts]
    report = evaluate(folder, forget=elsewhere, retain=elsewhere)
    assert report.base == evaluate(folder, forget=facts, retain=facts).base


def test_known_only_leaves_the_others_out(folder: Path, facts: list[dict[str, Any]]) -> None:
    report = evaluate(folder, forget=facts, known_only=True)
    assert (report.facts, report.known) == (2, 1)
    assert report.base.efficacy.fraction == 1.0
    with pytest.raises(ForgetSetError):
        evaluate(folder, forget=facts[1:], known_only=True)


def test_patches_change_the_figures_and_stack_in_order(
    folder: Path, model: Model, facts: list[dict[str, Any]], tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("Some words, and then some more of them. " * 80)
    wild, undo = patch_of(model, 30.0), patch_of(model, 1 / 31 - 1)
    wild.write(tmp_path / "wild.st")
    one = evaluate(folder, patches=[tmp_path / "wild.st"], forget=facts, retain=facts, ppl=text)
    assert one.base.retained.of == 1  # of those that the base knows
    assert one.as_dict()["retain"] == {"facts": 2, "known": 1}
    assert one.patched.perplexity != one.base.perplexity
    both = evaluate(folder, patches=[wild, undo], forget=facts, ppl=text)
    assert both.patches == (wild.id, undo.id)
    assert both.patched.perplexity == pytest.approx(both.base.perplexity, rel=1e-3)
    assert both.base.perplexity == one.base.perplexity


def test_a_patch_for_other_weights_is_refused(folder: Path, model: Model, facts: Any) -> None:
    patch = patch_of(model, 0.5)
    with pytest.raises(BaseMismatchError):
        evaluate(folder, patches=[patch], forget=facts, dtype="float16")
    name = model.module_name(1)
    manifest = patch.manifest
    other = module_base(model.served(model.module_name(2)))
    base = manifest.base.model_copy(update={"modules": {name: other}})
    wrong = Patch.build(manifest.model_copy(update={"base": base}), patch.deltas)
    with pytest.raises(BaseMismatchError):
        evaluate(folder, patches=[wrong], forget=facts)
    base = manifest.base.model_copy(update={"modules": {"model.layers.77.mlp.down_proj": other}})
    delta = {"model.layers.77.mlp.down_proj": patch.deltas[name]}
    wrong = Patch.build(manifest.model_copy(update={"base": base}), delta)
    with pytest.raises(BaseMismatchError, match="77"):
        evaluate(folder, patches=[wrong], forget=facts)


def test_weights_are_served_in_what_the_patches_are_for(
    folder: Path, facts: Any, tmp_path: Path
) -> None:
    patch = patch_of(load(folder, "float16"), 0.5)
    report = evaluate(folder, patches=[patch], forget=facts)
    assert report.as_dict()["dtype"] == "float16"
    assert evaluate(folder, forget=facts).as_dict()["dtype"] == "bfloat16"
    assert set(statistics_of(folder, [patch, patch], cache=tmp_path)) == set(patch.deltas)


def test_a_seed_is_looked_at_before_the_model() -> None:
    for seed in (-1, 2**53):
        with pytest.raises(UsageError, match="seed"):
            evaluate("/no/such/model", forget=[], seed=seed)


def test_further_fields_are_looked_at_before_the_model(facts: list[dict[str, Any]]) -> None:
    with pytest.raises(ForgetSetError, match="line 1: wrong: not a list of texts"):
        evaluate("/no/such/model", forget=[{**facts[0], "wrong": "x"}])
    with pytest.raises(ForgetSetError, match="line 1: group: not a text"):
        evaluate("/no/such/model", forget=facts, retain=[{**facts[0], "group": 3}])


def test_perplexity_is_over_whole_windows(model: Model) -> None:
    ids = model.tokenizer("Some words of a text. " * 200, verbose=False).input_ids
    windows = cut(model, "Some words of a text. " * 200)
    assert {len(window) for window in windows} == {256}  # this model takes no more
    assert [token for window in windows for token in window] == ids[: 256 * len(windows)]
    total, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            scores = model.network(torch.tensor([window])).logits[0].log_softmax(-1)
        for place, token in enumerate(window[1:]):
            total -= scores[place, token].item()
            count += 1
    assert perplexity(model, windows) == pytest.approx(math.exp(total / count), rel=1e-4)
    assert len(cut(model, "Short")) == 1


def test_a_text_that_can_not_be_used(folder: Path, facts: Any, tmp_path: Path) -> None:
    (tmp_path / "dot").write_text(".")
    with pytest.raises(InputError):
        evaluate(folder, forget=facts, ppl=tmp_path / "missing")
    with pytest.raises(InputError, match="one token"):
        evaluate(folder, forget=facts, ppl=tmp_path / "dot")


@pytest.mark.model
def test_the_real_model_knows_what_the_data_says(real_model: Path) -> None:
    report = evaluate(real_model, forget=tiny.DATA / "facts.jsonl", dtype="bfloat16")
    assert (report.facts, report.known) == (204, 180)
    assert report.base.efficacy.yes == 180


@pytest.mark.model
def test_the_real_model_is_probed(real_model: Path) -> None:
    forget = tiny.DATA / "facts.jsonl"
    probes = "rank,chat,says,lens,quantise"
    report = evaluate(real_model, forget=forget, known_only=True, limit=4, probes=probes)
    found = {name: one["base"] for name, one in report.probes.items()}
    assert found["rank"]["each"] == [1] * 4
    assert found["says"]["answer"]["yes"] == 4
    assert found["chat"]["any"]["yes"] >= 1
    # What is known is read out late, not early.
    by_layer = [share["yes"] for share in found["lens"]["layers"]]
    assert len(by_layer) == 30
    assert (by_layer[0], by_layer[-1]) == (0, 4)
    assert found["quantise"]["int8"]["efficacy"]["yes"] == 4
