"""Published file formats: small files with made-up facts in each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patcher.errors import ForgetSetError, UsageError
from patcher.evaluation import rows_from
from patcher.evaluation.readers import FORMATS, format_of, opened
from patcher.unlearn.facts import read_facts

REWRITE = {
    "prompt": "The river {} flows into", "relation_id": "P403", "subject": "Ilm",
    "target_new": {"str": "Lake Ohm", "id": "Q1"}, "target_true": {"str": "Lake Una", "id": "Q2"},
}  # fmt: skip

COUNTERFACT = {
    "case_id": 3, "pararel_idx": 9, "requested_rewrite": REWRITE,
    "paraphrase_prompts": ["The Ilm ends in", "Where the Ilm ends lies"],
    "neighborhood_prompts": ["The river Orr flows into", "The river Ebb flows into"],
    "attribute_prompts": ["The river Uhl flows into"], "generation_prompts": ["The Ilm is"],
}  # fmt: skip

ZSRE = {
    "subject": "Ada Vell", "src": "Who taught Ada Vell?", "pred": "Bo", "alt": "Cy Marr",
    "rephrase": "Ada Vell was taught by whom?", "answers": ["Dov Lint"],
    "loc": "nq question: who built the old mill", "loc_ans": "the Marr brothers",
    "cond": "Bo >> Cy Marr || Who taught Ada Vell?",
}  # fmt: skip

MQUAKE = {
    "case_id": 1, "requested_rewrite": [{**REWRITE, "question": "Into what does the Ilm flow?"}],
    "questions": ["In which land is the lake that the Ilm flows into?", "What land has that lake?"],
    "answer": "Norva", "answer_alias": ["the Norva"], "new_answer": "Suda", "new_answer_alias": [],
    "single_hops": [
        {"question": "Into what does the Ilm flow?", "cloze": "The Ilm flows into",
         "answer": "Lake Una", "answer_alias": []},
    ],
    "new_single_hops": [], "orig": {},
}  # fmt: skip

RWKU = [
    {
        "subject": "Ada Vell",
        "level": "1",
        "query": "Ada Vell was born in ___.",
        "type": "cloze",
        "answer": "Norva",
    },
    {
        "subject": "Ada Vell",
        "level": "1",
        "query": "Ada Vell's book, ___, sold well.",
        "type": "cloze",
        "answer": "Tides",
    },
    {
        "subject": "Ada Vell",
        "level": "2",
        "query": "What did Ada Vell study?",
        "type": "simple question",
        "answer": "law",
    },
    {
        "subject": "Ada Vell",
        "level": "3",
        "query": "Who wrote Tides?",
        "type": "reverse query",
        "answer": "Ada Vell",
    },
    {
        "subject": "Ada Vell",
        "neighbor": "Bo Lint",
        "level": "2",
        "query": "Where did Bo Lint live?",
        "type": "simple question",
        "answer": "Suda",
    },
]

TOFU = {
    "question": "Where was Ada Vell born?", "answer": "Ada Vell was born in Norva.",
    "paraphrased_answer": "Norva is where Ada Vell was born.",
    "paraphrased_question": "What is Ada Vell's birthplace?",
    "perturbed_answer": ["Ada Vell was born in Suda.", "Ada Vell was born in Ohm."],
}  # fmt: skip

SAMPLES: dict[str, list[dict[str, Any]]] = {
    "counterfact": [COUNTERFACT],
    "zsre": [ZSRE],
    "mquake": [MQUAKE],
    "rwku": RWKU,
    "tofu": [TOFU],
}


def written(folder: Path, records: Any, lines: bool = False) -> Path:
    path = folder / "facts.json"
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1)
    path.write_text(text + "\n", "utf-8")
    return path


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_published_file_is_recognised_and_gives_facts(
    tmp_path: Path, name: str, lines: bool
) -> None:
    path = written(tmp_path, SAMPLES[name], lines)
    assert format_of(path) == name
    rows = rows_from(path)
    assert rows == rows_from(path, name)
    facts = read_facts(rows)  # located: every subject that is named stands in its prompt
    assert [fact.target for fact in facts] == [row["target"] for row in rows]


def test_counterfact_forgets_the_true_answer_and_keeps_all_neighbours(tmp_path: Path) -> None:
    (row,) = rows_from(written(tmp_path, [COUNTERFACT]))
    assert row["prompt"] == "The river Ilm flows into"
    assert (row["subject"], row["target"], row["relation"]) == ("Ilm", "Lake Una", "P403")
    assert row["paraphrases"] == COUNTERFACT["paraphrase_prompts"]
    assert row["neighbours"] == [
        {"prompt": "The river Orr flows into", "target": "Lake Una"},
        {"prompt": "The river Ebb flows into", "target": "Lake Una"},
    ]


def test_counterfact_neighbours_that_say_their_own_target_keep_it(tmp_path: Path) -> None:
    near = [{"prompt": "The river Orr flows into", "target": "the sea"}]
    (row,) = rows_from(written(tmp_path, [{**COUNTERFACT, "neighborhood_prompts": near}]))
    assert row["neighbours"] == near


def test_zsre_takes_the_first_answer_and_not_the_edit(tmp_path: Path) -> None:
    (row,) = rows_from(written(tmp_path, [ZSRE]))
    assert (row["prompt"], row["target"]) == ("Who taught Ada Vell?", "Dov Lint")
    assert row["rephrase"] == ZSRE["rephrase"]
    assert (row["locality"], row["locality_target"]) == (ZSRE["loc"], ZSRE["loc_ans"])


def test_mquake_asks_an_edit_of_several_cases_once_with_all_their_questions(tmp_path: Path) -> None:
    again = {**MQUAKE, "questions": ["Whose lake does the Ilm end in?"], "answer": "Norvans"}
    (row,) = rows_from(written(tmp_path, [MQUAKE, again]))
    assert row["target"] == "Lake Una"
    assert row["paraphrases"] == ["Question: Into what does the Ilm flow?\nAnswer:"]
    assert [hop["targets"] for hop in row["multihop"]] == 2 * [["Norva", "the Norva"]] + [
        ["Norvans", "the Norva"]
    ]


def test_rwku_clozes_questions_and_neighbours(tmp_path: Path) -> None:
    end, middle, asked, reverse, near = rows_from(written(tmp_path, RWKU))
    assert (end["prompt"], end["group"]) == ("Ada Vell was born in", "level 1: cloze")
    assert middle["prompt"].startswith("Fill in the blank. Question: Ada Vell's book, ___, sold")
    assert asked["prompt"] == "Question: What did Ada Vell study?\nAnswer:"
    assert "subject" not in reverse  # the prompt doesn't name it
    assert near["subject"] == "Bo Lint"


def test_tofu_keeps_wrong_and_restated_answers(tmp_path: Path) -> None:
    (row,) = rows_from(written(tmp_path, [{**TOFU, "name": "Ada Vell"}]))
    assert row["rephrase"] == "Question: What is Ada Vell's birthplace?\nAnswer:"
    assert row["restated"] == TOFU["paraphrased_answer"]
    assert row["wrong"] == TOFU["perturbed_answer"]
    assert row["subject"] == "Ada Vell"


def test_own_lines_pass_through(tmp_path: Path) -> None:
    own = [{"prompt": "a b", "target": "c", "relation": "r"}, {"prompt": "d e", "target": "f"}]
    path = written(tmp_path, own, lines=True)
    assert format_of(path) == "jsonl"
    assert rows_from(path) == own
    assert rows_from(path, limit=1) == own[:1]


def test_limit_stops_early(tmp_path: Path) -> None:
    assert len(rows_from(written(tmp_path, RWKU), limit=2)) == 2


def test_records_without_an_answer_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, [ZSRE, {**ZSRE, "src": "Who taught Bo?", "answers": [""]}])
    assert len(rows_from(path)) == 1
    assert "1 records with an empty answer" in caplog.text
    with pytest.raises(ForgetSetError, match="no fact with an answer"):
        rows_from(written(tmp_path, [{**ZSRE, "answers": []}]))


def broken(record: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**record, **changes}


@pytest.mark.parametrize(
    ("name", "record", "field"),
    [
        ("counterfact", broken(COUNTERFACT, requested_rewrite="x"), "requested_rewrite: not an"),
        (
            "counterfact",
            broken(COUNTERFACT, requested_rewrite={**REWRITE, "prompt": "The"}),
            "has no {}",
        ),
        (
            "counterfact",
            broken(COUNTERFACT, requested_rewrite={**REWRITE, "target_true": {}}),
            "str: missing",
        ),
        (
            "counterfact",
            broken(COUNTERFACT, paraphrase_prompts="x"),
            "paraphrase_prompts: not a list",
        ),
        (
            "counterfact",
            broken(COUNTERFACT, neighborhood_prompts=[3]),
            "neighborhood_prompts: neither",
        ),
        ("zsre", broken(ZSRE, src=None), "src: missing"),
        ("zsre", broken(ZSRE, answers="Dov"), "answers: not a list"),
        ("mquake", broken(MQUAKE, requested_rewrite=REWRITE), "requested_rewrite: not a list"),
        ("mquake", broken(MQUAKE, answer=4), "answer: not a text"),
        ("rwku", broken(RWKU[0], query=7), "query: not a text"),
        ("tofu", broken(TOFU, perturbed_answer={"a": 1}), "perturbed_answer: not a list"),
    ],
)
def test_a_record_of_the_wrong_shape_is_named_without_its_text(
    tmp_path: Path, name: str, record: dict[str, Any], field: str
) -> None:
    path = written(tmp_path, [*SAMPLES[name], record])
    with pytest.raises(ForgetSetError) as caught:
        rows_from(path, name)
    message = caught.value.message
    assert f"record {len(SAMPLES[name]) + 1}: " in message
    assert field in message
    assert "Ilm" not in message
    assert "Vell" not in message


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('[{"animal": "cat"}]', "no known format"),
        ('{"animal": "cat"}', "no known format"),
        (json.dumps([{**ZSRE, **TOFU}]), "could be zsre or tofu"),
        ('[{"src": 1},', "not JSON"),
        ("[1, 2]", "record 1 is not an object"),
    ],
)
def test_unknown_ambiguous_and_damaged_files(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(content)
    with pytest.raises(ForgetSetError, match=why):
        rows_from(path)


def test_a_file_that_is_not_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ForgetSetError, match="not UTF-8"):
        rows_from(tmp_path / "bytes")
    with pytest.raises(ForgetSetError, match="can't be read"):
        rows_from(tmp_path / "nowhere")


def test_an_unknown_format_is_a_wrong_word(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="csv"):
        rows_from(written(tmp_path, RWKU), "csv")
    assert FORMATS == ("auto", "jsonl", "counterfact", "zsre", "mquake", "rwku", "tofu")


OWN: dict[str, Any] = {"prompt": "Ada Vell lives in", "target": "Norva"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("neighbours", "x"),
        ("neighbours", ["x"]),
        ("neighbours", [{"prompt": "x"}]),
        ("neighbours", [{"prompt": "x", "target": " "}]),
        ("neighbours", [{"prompt": "x", "target": "\ud800"}]),
        ("multihop", {"prompt": "x", "targets": ["y"]}),
        ("multihop", [{"prompt": "x"}]),
        ("multihop", [{"prompt": "x", "targets": []}]),
        ("multihop", [{"prompt": "x", "targets": "y"}]),
        ("multihop", [{"prompt": 3, "targets": ["y"]}]),
        ("multihop", [{"prompt": "x", "targets": ["y", 3]}]),
        ("wrong", "x"),
        ("wrong", [3]),
        ("wrong", ["\ud800"]),
        ("wrong", [""]),
        ("restated", 3),
        ("restated", "\udfff"),
        ("relation", ["r"]),
        ("relation", "\ud800"),
        ("group", 3),
        ("group", "\ud800"),
    ],
)
def test_a_further_field_of_another_kind_is_named_by_line(
    tmp_path: Path, field: str, value: Any
) -> None:
    rows = [OWN, {**OWN, "prompt": "Bo lives in", field: value}, {**OWN, field: value}]
    for source in (rows, written(tmp_path, rows, lines=True)):
        with pytest.raises(ForgetSetError) as caught:
            opened(source)
        assert "2 problems" in caught.value.message
        for number in (2, 3):
            assert f"line {number}: {field}: not a" in caught.value.message
        assert "Ada" not in caught.value.message


def test_further_fields_that_are_right_or_not_there_pass(tmp_path: Path) -> None:
    full = {
        "neighbours": [{"prompt": "x", "target": "y"}],
        "multihop": [{"prompt": "x", "targets": ["y"]}],
        "wrong": ["a", "b"], "restated": "in Norva", "relation": "home", "group": "g",
    }  # fmt: skip
    rows = [{**OWN, **full}, {**OWN, **dict.fromkeys(full)}, {**OWN, "wrong": [], "group": ""}]
    assert opened(rows)[1] == dict(enumerate(rows, 1))
    assert opened(written(tmp_path, rows, lines=True))[1] == dict(enumerate(rows, 1))


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("counterfact", broken(COUNTERFACT, neighborhood_prompts=["The \ud800 flows"])),
        ("mquake", broken(MQUAKE, questions=["\ud800?"])),
        ("tofu", broken(TOFU, paraphrased_answer="\ud800")),
    ],
)
def test_a_record_with_half_a_surrogate_pair_is_named(
    tmp_path: Path, name: str, record: dict[str, Any]
) -> None:
    with pytest.raises(ForgetSetError, match=r"record 1: .*not valid Unicode"):
        rows_from(written(tmp_path, [record]), name)
