"""Verified edits: bars, what a further attempt asks for, and never a silent half success."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patcher.errors import BarsNotMetError, UsageError
from patcher.patch import Patch
from patcher.unlearn import Bars, compute
from patcher.unlearn.attempts import ATTEMPTS, further_layers
from patcher.unlearn.bars import Reached, as_document, missed, not_met, rank
from patcher.unlearn.job import Job
from patcher.unlearn.models import Model
from patcher.unlearn.prompts import Encoded
from patcher.unlearn.slopes import Wish
from patcher.unlearn.wishes import firmer, wishes_for

from .conftest import said_by
from .test_compute import still_said


@pytest.fixture(scope="module")
def rows(tiny_model: Model) -> list[dict[str, Any]]:
    return said_by(tiny_model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_efficacy": -0.1},
        {"max_generalization": 1.01},
        {"min_specificity": float("nan")},
        {"min_retained": 95},
        {"max_ppl_ratio": 0},
        {"max_ppl_ratio": float("inf")},
        {"max_efficacy": True},
    ],
)
def test_bars_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--m"):
        Bars(**wrong)


def test_a_bar_of_nought_is_a_bar() -> None:
    assert Bars(max_efficacy=0).given == {"max_efficacy": 0}
    assert Bars().given == {}


SHARES = st.floats(0, 1)


@given(SHARES, SHARES)
def test_a_bar_holds_up_to_itself_and_is_missed_by_the_rest(bar: float, value: float) -> None:
    bars = Bars(max_efficacy=bar, min_specificity=bar)
    reached = bars.reached({"max_efficacy": value, "min_specificity": value})
    names = missed(reached)
    assert ("max_efficacy" in names) == (value > bar)
    assert ("min_specificity" in names) == (value < bar)
    assert rank(reached)[0] == len(names)
    assert rank(reached)[1] == pytest.approx(abs(value - bar))
    assert {name for name, one in as_document(reached).items() if not one["met"]} == set(names)


def test_a_figure_that_is_none_or_nan_never_meets_its_bar() -> None:
    for value in (None, float("nan")):
        assert missed({"max_ppl_ratio": Reached(1.01, value)}) == ["max_ppl_ratio"]


def test_the_error_names_bar_value_and_cure() -> None:
    reached = {"max_efficacy": Reached(0.0, 0.0), "max_ppl_ratio": Reached(1.01, 1.25)}
    error = not_met(reached, 4)
    assert "max_ppl_ratio 1.01 with 1.25" in error.message
    assert "efficacy" not in error.message
    assert "4 attempts" in error.message
    assert error.cure
    assert error.exit_code == 12


def test_further_layers_are_the_next_above_then_below() -> None:
    assert further_layers((3, 4, 5), 30, 2) == (6, 7)
    assert further_layers((1, 2), 4, 2) == (3, 0)
    assert further_layers((0, 1), 2, 2) == ()


def test_goals_move_for_the_facts_that_are_named(tiny_model: Model) -> None:
    facts = [Encoded([5, 6], [7], 1), Encoded([5, 8], [9], 1)]
    usual, further = firmer(wishes_for(facts, "suppress", tiny_model.tokenizer), -5.0, {1: 3.0})
    assert (usual.goal, further.goal) == (-5.0, -8.0)
    usual, further = firmer(wishes_for(facts, "eos", tiny_model.tokenizer), -5.0, {1: 3.0})
    assert further.goal == usual.goal + 3.0


def test_bars_that_hold_are_met_at_the_first_attempt(tiny_folder: Path, rows: Any) -> None:
    bars = Bars(max_efficacy=0, min_specificity=0.0, max_ppl_ratio=1000.0)
    result = compute(tiny_folder, rows, bars=bars)
    assert result.met
    assert result.as_dict()["met"] is True
    told = result.patch.manifest.evaluation
    assert told is not None
    assert told["attempts"] == 1
    assert told["bars"]["max_efficacy"] == {"bar": 0, "value": 0.0, "met": True}


def test_a_bar_that_cannot_hold_is_told_and_the_best_is_written(
    tiny_folder: Path, tiny_model: Model, rows: Any, tmp_path: Path
) -> None:
    bars = Bars(max_efficacy=0, max_ppl_ratio=1e-6)
    with pytest.raises(BarsNotMetError, match="max_ppl_ratio") as caught:
        compute(tiny_folder, rows[:2], tmp_path / "p.st", bars=bars)
    result = caught.value.result
    patch = Patch.read(tmp_path / "p.st")
    assert patch == result.patch
    assert not result.met
    told = patch.manifest.evaluation
    assert told is not None
    assert told["attempts"] == ATTEMPTS
    assert told["bars"]["max_ppl_ratio"]["met"] is False
    assert told["bars"]["max_efficacy"]["met"] is True
    assert told["answered"] == still_said(tiny_model, rows[:2], patch)


def test_survivors_alone_get_more_strength_and_layers(
    tiny_folder: Path, tiny_model: Model, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[int, float]] = []

    def lenient(wishes: Any, goal: float, further: Any) -> Any:
        asked.append(dict(further))
        made = firmer(wishes, goal, further)
        # The first two attempts ask something of one fact alone; others survive.
        return made if len(asked) > 2 else [replace(w, goal=20.0) if w.fact else w for w in made]

    monkeypatch.setattr("patcher.unlearn.methods.zero.firmer", lenient)
    weak = compute(tiny_folder, rows, layers="1").patch
    survivors = [i for i, row in enumerate(rows) if still_said(tiny_model, [row], weak)]
    assert 0 < len(survivors) < len(rows)
    asked.clear()
    result = compute(tiny_folder, rows, layers="1", bars=Bars(max_efficacy=0))
    assert asked == [{i: nats for i in survivors if nats} for nats in (0.0, 3.0, 6.0)]
    assert result.evaluation["attempts"] == 3
    assert result.evaluation["answered"] == still_said(tiny_model, rows, result.patch) == 0
    told = result.patch.manifest.method.hyperparameters
    assert told["firmer"] == {"facts": len(survivors), "nats": 6.0}
    assert told["extra_layers"] == [2, 3]
    first, *further = [result.modules[tiny_model.module_name(layer)] for layer in (1, 2, 3)]
    assert all(len(survivors) <= one < first for one in further)


def test_a_fact_that_turns_up_in_generated_text_is_a_survivor(
    tiny_folder: Path, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def turning_up(job: Job) -> list[Wish | None]:
        seen.extend(range(len(job.facts)))
        return [None, Wish([1], 2, -7.0, 1) if len(seen) <= 2 else None]

    monkeypatch.setattr("patcher.unlearn.check.leaks", turning_up)
    result = compute(tiny_folder, rows[:2], layers="1", bars=Bars(max_leaked=0))
    assert seen == [0, 1, 0, 1]
    assert result.evaluation["attempts"] == 2
    assert result.evaluation["bars"]["max_leaked"] == {"bar": 0, "value": 0.0, "met": True}
    assert result.patch.manifest.method.hyperparameters["firmer"] == {"facts": 1, "nats": 3.0}


def test_a_further_layer_holds_the_survivors_alone(tiny_model: Model, rows: Any) -> None:
    from patcher.unlearn.choosing import choose
    from patcher.unlearn.facts import read_facts
    from patcher.unlearn.job import Settings
    from patcher.unlearn.methods.zero import zero
    from patcher.unlearn.preparing import prepare
    from patcher.unlearn.progress import Silent
    from patcher.unlearn.reference import reference_text

    chosen = choose(tiny_model, read_facts(rows), False, None, Silent())
    text = reference_text(None)
    job, _ = prepare(tiny_model, chosen, Settings((1,)), text, [], None, Silent())
    job = replace(job, augmented=(), firmer={0: 3.0, 2: 3.0}, extra_layers=(2,))
    ranks = {name: delta.rank for name, delta in zero(job).deltas.items()}
    assert ranks[tiny_model.module_name(1)] == len(rows)
    assert ranks[tiny_model.module_name(2)] == 2


@pytest.mark.parametrize("bar", ["max_generalization", "min_retained"])
def test_a_bar_with_nothing_to_measure_is_refused_before_computing(
    tiny_folder: Path, rows: Any, bar: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="nothing to be measured on"):
        compute(tiny_folder, rows, tmp_path / "p.st", bars=Bars(**{bar: 0.5}))
    assert not (tmp_path / "p.st").exists()


def test_neighbours_and_retained_facts_are_measured(tiny_folder: Path, rows: Any) -> None:
    near = {"locality": rows[1]["prompt"], "locality_target": rows[1]["target"]}
    forget = [{**rows[0], **near}]
    bars = Bars(min_specificity=0.0, min_retained=0.0)
    result = compute(tiny_folder, forget, retain=rows[2:4], bars=bars)
    assert result.evaluation["neighbours"]["base"] == 1
    kept = result.evaluation["preserved"]
    assert result.evaluation["bars"]["min_retained"]["value"] == kept["patched"] / 2
