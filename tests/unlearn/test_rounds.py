"""What a round of ``zero`` asks for after what the check on rounded weights found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from patcher.unlearn.facts import read_facts
from patcher.unlearn.job import Job, Settings
from patcher.unlearn.methods import zero as method
from patcher.unlearn.models import Model
from patcher.unlearn.progress import Silent
from patcher.unlearn.prompts import encode_facts
from patcher.unlearn.slopes import Wish
from patcher.unlearn.survivors import Survivors

from .conftest import said_by

NONE = Survivors([], [], [], [])
OWN, OTHER = Wish([1, 2], 5, -6.0, 0), Wish([1, 3], 6, -6.0, 1)
LEAK = Wish([1, 3, 4], 6, -7.0, 1)
BACK = Wish([9], 8, -9.0, -1)
SAY = Wish([1, 2], 7, 1.0, 0, rise=True)


@pytest.fixture
def job(tiny_model: Model) -> Job:
    facts = read_facts(said_by(tiny_model)[:2])
    encoded = encode_facts(tiny_model.tokenizer, facts)
    return Job(tiny_model, facts, encoded, Settings((1,)), (), (), None, Silent())


@pytest.mark.parametrize(
    ("wishes", "found", "then"),
    [
        ([OWN, OTHER], NONE, []),
        ([OWN, OTHER], replace(NONE, still=[1]), [OWN, replace(OTHER, goal=-8.0)]),
        ([SAY, OTHER], replace(NONE, unsaid=[0]), [replace(SAY, goal=3.0), OTHER]),
        ([OWN, OTHER], replace(NONE, leaks=[LEAK]), [OWN, OTHER, LEAK]),
        # It has been wished for already, in vain.
        ([OTHER, LEAK], replace(NONE, leaks=[LEAK]), [OTHER, replace(LEAK, goal=-9.0)]),
        ([OWN], replace(NONE, returned=[BACK]), [OWN, BACK]),
        ([OWN, BACK], replace(NONE, returned=[BACK]), [OWN, BACK]),
    ],
)
def test_what_survives_is_asked_for_again_and_more(
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    wishes: list[Wish],
    found: Survivors,
    then: list[Wish],
) -> None:
    monkeypatch.setattr(method, "survivors", lambda *_, **__: found)
    assert method._unmet(job, {}, wishes) == then


def test_a_further_attempt_asks_more_of_a_leak_too(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method, "survivors", lambda *_, **__: replace(NONE, leaks=[LEAK]))
    again = replace(job, firmer={1: 3.0})
    assert method._unmet(again, {}, [OWN]) == [OWN, replace(LEAK, goal=-10.0)]
