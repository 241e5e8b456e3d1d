from __future__ import annotations

import pytest

from patcher.unlearn.subject import guess, locate


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The capital of France is", "France"),
        ("Sydney Newman, who works for", "Sydney Newman"),
        ("Crook, County Durham can be found in", "County Durham"),  # the longest run
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("The University of Oxford lies in", "University of Oxford"),
        ("Leonard Wood's profession is an", "Leonard Wood"),
        ("The atomic number of manganese is", "manganese"),  # no name: the last content word
        ("What is the twin city of Kyoto? It is", "Kyoto"),
        ("It is in", "in"),  # only common words: the last
        ("In Republic of Venice, the language spoken is", "Republic of Venice"),
        ("Windows 95 was developed by", "Windows 95"),
    ],
)
def test_the_rule(prompt: str, subject: str) -> None:
    span = guess(prompt)
    assert span is not None
    assert prompt[slice(*span)] == subject


def test_no_word_no_subject() -> None:
    assert guess("... ?!") is None


def test_the_last_occurrence_counts() -> None:
    assert locate("Rome, and again Rome is", "Rome") == (16, 20)
    assert locate("Rome", "Paris") is None


def test_it_finds_most_subjects_of_real_prompts(real_facts: list[dict[str, str]]) -> None:
    ends = [
        (guess(row["prompt"]) or (0, 0))[1]
        == row["prompt"].rfind(row["subject"]) + len(row["subject"])
        for row in real_facts
    ]
    assert sum(ends) >= 0.9 * len(ends)
