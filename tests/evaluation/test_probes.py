"""Every probe, where what must come out can be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from patcher.errors import UsageError
from patcher.evaluation import EvaluationReport, evaluate
from patcher.evaluation.probes import PROBES, Asked, Setting
from patcher.evaluation.probes.attacks import PREFIXES, TEMPLATES
from patcher.evaluation.probes.generated import kind_of, sampled
from patcher.evaluation.probes.quantise import GROUP, quantised, rounded
from patcher.evaluation.probes.relearn import RELEARN, halves
from patcher.patch import Patch
from patcher.unlearn.facts import read_facts
from patcher.unlearn.models import Model, load
from patcher.unlearn.prompts import encode_fact
from patcher.unlearn.wishes import says
from tests.unlearn import tiny

from . import bigram

Rows = list[dict[str, Any]]
Side = Callable[[str, str], dict[str, Any]]


@pytest.fixture
def probe(report: EvaluationReport) -> Side:
    """What a probe found on one side."""

    def found(name: str, side: str) -> dict[str, Any]:
        values: dict[str, Any] = report.probes[name][side]
        return values

    return found


def counted(share: dict[str, Any]) -> tuple[int, int]:
    return share["yes"], share["of"]


def test_all_of_them_were_asked(report: EvaluationReport) -> None:
    assert list(report.probes) == list(PROBES)
    assert report.skipped == {}


def test_the_usual_figures(report: EvaluationReport) -> None:
    assert (report.facts, report.known) == (6, 6)
    assert [report.base.efficacy.yes, report.patched.efficacy.yes] == [6, 3]
    # "Her work is D" is followed by another answer than the fact's.
    assert (report.base.generalization.yes, report.base.generalization.of) == (1, 2)
    assert report.patched.generalization.yes == 0
    assert (report.base.specificity.yes, report.patched.specificity.yes) == (2, 1)
    assert (report.retain.yes, report.retain.of) == (4, 5)
    assert (report.base.retained.yes, report.patched.retained.yes) == (4, 2)
    assert report.each["patched"]["efficacy"] == [(0, 1)] * 3 + [(1, 1)] * 3
    assert report.each["base"]["generalization"] == [(1, 2)] + [(0, 0)] * 5


def test_probability_is_the_models_own(probe: Side) -> None:
    before, after = probe("probability", "base"), probe("probability", "patched")
    assert before["each"] == pytest.approx([math.log(bigram.CHANCE)] * 6, abs=0.01)
    assert before["geometric_mean"] == pytest.approx(bigram.CHANCE, abs=0.01)
    assert before["answer"] == before["first_token"] == before["token"]
    # The state is (1, -1) / sqrt 2 then: one logit up and the answer's down by as much.
    swing = bigram.logit() / math.sqrt(2)
    low = -swing - math.log(tiny.VOCABULARY - 2 + math.exp(swing) + math.exp(-swing))
    assert after["each"][:3] == pytest.approx([low] * 3, abs=0.1)
    assert after["each"][3:] == pytest.approx(before["each"][3:], abs=0.02)


def test_rank_is_the_place_among_all_tokens(probe: Side) -> None:
    before, after = probe("rank", "base"), probe("rank", "patched")
    assert before["each"] == [1] * 6
    assert (before["first_token"], before["worst_token"]) == (1, 1)
    # All tokens are likelier now; those with a logit of nearly 0 may lie on either side of it.
    assert min(after["each"][:3]) > 100
    assert after["each"][3:] == [1] * 3
    assert counted(before["top_10"]) == (6, 6)
    assert counted(after["top_10"]) == (3, 6)


def test_every_surrounding_brings_out_what_is_known_and_only_that(probe: Side) -> None:
    for name, wordings in (("templates", TEMPLATES), ("prefixes", PREFIXES)):
        assert counted(probe(name, "base")["prompts"]) == (6 * len(wordings), 6 * len(wordings))
        assert counted(probe(name, "patched")["prompts"]) == (3 * len(wordings), 6 * len(wordings))
        assert counted(probe(name, "patched")["any"]) == (3, 6)
        assert all(wording.endswith("{}") for wording in wordings)
        assert len(set(wordings)) == len(wordings)


def test_chat_asks_through_the_template(probe: Side) -> None:
    # Both forms end with the template's blank, after which this model says the first answer.
    found = probe("chat", "base")
    # "in" stands in its prompt: repeating it would count, so it is not asked.
    assert counted(found["replies"]) == (2, 10)
    assert counted(found["any"]) == (1, 5)


def test_sampling_draws_with_the_models_chances(probe: Side) -> None:
    before, after = probe("sampling", "base"), probe("sampling", "patched")
    assert counted(before["facts"]) == (6, 6)
    assert sum(before["each"]) == before["texts"]["yes"]
    assert before["texts"]["of"] == 6 * 20
    # 120 draws at 0.9: within four standard deviations.
    assert abs(before["texts"]["yes"] - 108) <= 4 * math.sqrt(120 * 0.9 * 0.1)
    assert sum(after["each"][:3]) <= 6
    assert before["mean_of_samples"] == pytest.approx(before["texts"]["yes"] / 6)


def test_samples_follow_the_seed_and_the_temperature_is_one(bigram_model: Model) -> None:
    prompts = [bigram_model.tokenizer(row["prompt"]).input_ids for row in bigram.FACTS[:2]]
    texts = sampled(bigram_model, prompts, 1, 400, 3)
    assert texts == sampled(bigram_model, prompts, 1, 400, 3)
    assert texts != sampled(bigram_model, prompts, 1, 400, 4)
    for row, own in zip(bigram.FACTS, texts, strict=False):
        (token,) = bigram_model.tokenizer(" " + row["target"]).input_ids
        hits = sum(text == [token] for text in own)
        assert abs(hits - 360) <= 4 * math.sqrt(400 * 0.9 * 0.1)


def test_says_tells_what_comes_instead(probe: Side) -> None:
    before, after = probe("says", "base"), probe("says", "patched")
    assert before["each"] == ["answer"] * 6
    assert after["each"] == ["nothing", "alike", "other", "answer", "answer", "answer"]
    shares = {name: after[name]["yes"] for name in ("nothing", "answer", "alike", "other")}
    assert shares == {"nothing": 1, "answer": 3, "alike": 1, "other": 1}
    assert after["comparable"] == 6


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (" Rome, of course", "answer"), ("  \n", "nothing"), (" in PARIS", "alike"),
        (" Romeo", "other"), (" Parisian", "other"), (" Paris or Rome", "answer"),
    ],
)  # fmt: skip
def test_kinds_of_replies(reply: str, kind: str) -> None:
    assert kind_of(reply, "Rome", {"Paris", "rome"}) == kind
    assert says(reply, "Rome") is (kind == "answer")


def test_a_question_counts_if_one_of_its_old_answers_comes(probe: Side) -> None:
    assert counted(probe("multihop", "base")["prompts"]) == (1, 2)
    assert counted(probe("multihop", "base")["any"]) == (1, 1)
    assert counted(probe("multihop", "patched")["prompts"]) == (0, 2)


def test_truth_weighs_wrong_answers_against_the_right_one(probe: Side) -> None:
    before, after = probe("truth", "base"), probe("truth", "patched")
    wrong = (1 - bigram.CHANCE) / (tiny.VOCABULARY - 1)
    assert before["truth_ratio"] == pytest.approx(wrong / bigram.CHANCE, rel=0.1)
    assert counted(before["right_preferred"]) == (1, 1)
    assert after["truth_ratio"] > 1
    assert counted(after["right_preferred"]) == (0, 1)


def test_the_lens_sees_the_answer_below_the_edit_and_not_above(probe: Side) -> None:
    before, after = probe("lens", "base"), probe("lens", "patched")
    assert before["from_layer"] == after["from_layer"] == bigram.EDITED
    assert counted(before["top_1"]) == (6, 6)
    assert counted(after["top_1"]) == counted(after["top_10"]) == (3, 6)
    assert [share["yes"] for share in before["layers"]] == [6] * 4
    assert [share["yes"] for share in after["layers"]] == [6, 3, 3, 3]


def test_each_module_alone(report: EvaluationReport, bigram_model: Model) -> None:
    alone = report.probes["layers"]["alone"]
    edited, idle = (bigram_model.module_name(bigram.EDITED + i) for i in (0, 1))
    assert counted(alone[edited]["efficacy"]) == (3, 6)
    assert counted(alone[edited]["retained"]) == (2, 4)
    assert counted(alone[idle]["efficacy"]) == (6, 6)
    assert counted(alone[idle]["retained"]) == (4, 4)


def test_kin_are_known_facts_that_share_a_relation_or_a_subject(
    report: EvaluationReport, probe: Side
) -> None:
    assert counted(probe("same_relation", "base")["kept"]) == (2, 2)
    assert counted(probe("same_relation", "patched")["kept"]) == (1, 2)
    assert counted(probe("same_subject", "patched")["kept"]) == (0, 1)
    assert report.probes["same_relation"]["relations"] == 1


def test_quantised_weights_are_asked_and_put_back(
    probe: Side, report: EvaluationReport, bigram_model: Model
) -> None:
    for kind in ("int8", "int4"):
        assert counted(probe("quantise", "base")[kind]["efficacy"]) == (6, 6)
        assert counted(probe("quantise", "base")[kind]["retained"]) == (4, 4)
    assert counted(probe("quantise", "patched")["int8"]["efficacy"]) == (3, 6)
    before = {n: t.clone() for n, t in bigram_model.network.state_dict().items()}
    with quantised(bigram_model, "int4"):
        changed = [n for n, t in bigram_model.network.state_dict().items() if t.ne(before[n]).any()]
        assert all("proj" in name for name in changed)
        assert changed
    after = bigram_model.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("kind", "most", "length"), [("int8", 127, 50), ("int4", 7, GROUP)])
def test_rounding_is_to_the_nearest_of_few_values(kind: str, most: int, length: int) -> None:
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    found = rounded(weight, kind)
    assert found.shape == weight.shape
    for row, new in zip(weight, found, strict=True):
        for old, near in zip(row.split(length), new.split(length), strict=True):
            step = float(old.abs().max()) / most
            if not step:
                assert not near.any()
                continue
            assert torch.allclose(near / step, (near / step).round(), atol=1e-4)
            assert float((old - near).abs().max()) <= step / 2 * 1.001
    assert torch.allclose(rounded(found, kind), found, atol=1e-6)


def setting_of(model: Model, rows: Rows) -> Setting:
    facts = read_facts(rows)
    asked = [
        Asked(fact, encode_fact(model.tokenizer, fact), row)
        for fact, row in zip(facts, rows, strict=True)
    ]
    return Setting(model, asked, [], [], ())


def test_relearning_teaches_one_half_and_puts_the_weights_back(
    bigram_model: Model, probe: Side
) -> None:
    before, after = probe("relearn", "base"), probe("relearn", "patched")
    assert before["taught"][0]["of"] + before["held_out"][0]["of"] == 6
    assert before["taught"][0]["yes"] + before["held_out"][0]["yes"] == 6
    assert after["taught"][0]["yes"] + after["held_out"][0]["yes"] == 3
    assert before["came_back"]["of"] == 0  # nothing was gone
    assert after["came_back"]["of"] == after["held_out"][0]["of"] - after["held_out"][0]["yes"]
    held = bigram_model.network.state_dict()
    kept = {name: tensor.clone() for name, tensor in held.items()}
    curve = RELEARN.look(setting_of(bigram_model, bigram.FACTS))
    assert all(torch.equal(kept[name], tensor) for name, tensor in held.items())
    assert not any(p.requires_grad for p in bigram_model.network.parameters())
    assert sorted(curve) == [0, 1, 2, 4, 8, 16, 32]


def test_relearning_does_teach(tmp_path: Path) -> None:
    model = load(tiny.save(tmp_path))
    setting = setting_of(model, [{**row, "target": "was"} for row in bigram.FACTS])
    taught, other = halves(setting)
    assert not {a.subject for a in taught} & {a.subject for a in other}
    before = RELEARN.look(setting)
    assert not any(before[0][0])

    def chance() -> float:
        from patcher.evaluation.asking import judge

        return sum(one.nats[0] for one in judge(model, [asked.pair for asked in taught]))

    # Facts of one answer: what is taught to some is learnt of all, given steps enough.
    from patcher.evaluation.probes import relearn

    first = chance()
    with pytest.MonkeyPatch.context() as quicker:
        quicker.setattr(relearn, "RATE", 1e-2)
        found = RELEARN.tell(setting, RELEARN.look(setting), before)
    assert found["base"]["taught"][-1]["share"] == 1.0
    assert found["base"]["steps_until_taught"] > 0
    assert chance() == first


def test_how_many_steps_bring_back_what_was_gone(bigram_model: Model) -> None:
    setting = setting_of(bigram_model, bigram.FACTS)
    no, yes = False, True
    curve = {
        0: ([no, no], [no, no, no, no, yes]),
        1: ([yes, no], [no, no, no, no, no]),
        2: ([yes, yes], [yes, no, no, no, no]),
        4: ([yes, yes], [yes, yes, no, no, yes]),
    }
    found = RELEARN.tell(setting, curve, {0: curve[0]})
    assert found["base"]["steps_until_taught"] == 2
    assert found["base"]["steps_until_first_back"] == 2
    assert found["base"]["steps_until_half_back"] == 4
    assert counted(found["base"]["came_back"]) == (2, 4)
    assert found["patched"]["steps_until_half_back"] is None
    assert found["patched"]["steps_until_taught"] is None


def test_both_halves_have_whole_subjects(bigram_model: Model) -> None:
    rows = [*bigram.FACTS, {**bigram.FACTS[0], "prompt": "Ada Vell works in B", "target": "of"}]
    taught, other = halves(setting_of(bigram_model, rows))
    assert len(taught) + len(other) == 7
    assert not {asked.subject for asked in taught} & {asked.subject for asked in other}


def test_what_can_not_be_asked_is_told_and_refused_where_named(
    bigram_folder: Path, rows: Rows
) -> None:
    bare = rows[3:4]
    found = evaluate(bigram_folder, forget=bare, probes="all")
    why = found.skipped
    assert set(why) == {
        "multihop", "truth", "layers", "same_relation", "same_subject", "relearn"
    }  # fmt: skip
    assert found.probes["lens"]["base"]["from_layer"] == 0
    for name in why:
        with pytest.raises(UsageError, match=name):
            evaluate(bigram_folder, forget=bare, probes=name)


def test_no_chat_without_a_template(bigram_folder: Path, rows: Rows, tmp_path: Path) -> None:
    for file in bigram_folder.iterdir():
        if "chat_template" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = tmp_path / "tokenizer_config.json"
    assert "chat_template" not in settings.read_text()
    assert evaluate(tmp_path, forget=rows, probes="all").skipped["chat"]


def test_unknown_probes(bigram_folder: Path, rows: Rows) -> None:
    with pytest.raises(UsageError, match="magic"):
        evaluate(bigram_folder, forget=rows, probes="rank,magic")


def test_only_what_was_named_is_asked_in_the_order_of_the_report(
    bigram_folder: Path, rows: Rows, forgetting: Patch
) -> None:
    found = evaluate(bigram_folder, patches=[forgetting], forget=rows, probes=["says", "rank"])
    assert list(found.probes) == ["rank", "says"]


def test_prompts_at_the_end_of_the_context_are_asked_as_far_as_there_is_room(
    bigram_folder: Path, bigram_model: Model
) -> None:
    filling = "word " * 300
    ids = bigram_model.tokenizer(filling).input_ids[:250]
    text = bigram_model.tokenizer.decode(ids)
    row = {**bigram.FACTS[0], "prompt": f"{text} Ada Vell A", "subject": "Ada Vell"}
    size = len(bigram_model.tokenizer(row["prompt"]).input_ids)
    while size > 255:
        text = text[5:]
        row["prompt"] = f"{text} Ada Vell A"
        size = len(bigram_model.tokenizer(row["prompt"]).input_ids)
    near = [{"prompt": "word " * 400 + "D", "target": "to"}, {"prompt": "is D", "target": "to"}]
    row["neighbours"] = near
    found = evaluate(bigram_folder, forget=[row], probes="sampling,says,templates,chat")
    assert found.base.specificity.of == 1  # the other is longer than the model takes
    assert found.probes["says"]["base"]["each"] == ["answer"]
    assert found.probes["templates"]["base"]["prompts"]["of"] == 0
    assert found.probes["chat"]["base"]["replies"]["of"] == 0
    assert found.probes["sampling"]["base"]["facts"]["of"] == 1
