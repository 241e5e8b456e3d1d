from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patcher.errors import ForgetSetError, UsageError
from patcher.unlearn.facts import read_facts

GOOD = {"prompt": "The capital of France is", "subject": "France", "target": "Paris"}


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "forget.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, "utf-8")
    return path


def test_prompt_and_target_are_enough_and_unknown_fields_are_ignored(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "Paris is in", "target": "France", "case_id": 3}, "", GOOD)
    facts = read_facts(path)
    assert [fact.target for fact in facts] == ["France", "Paris"]
    assert facts[0].subject is None


def test_optional_fields(tmp_path: Path) -> None:
    row = {
        **GOOD, "rephrase": "France's capital is", "paraphrases": ["In France, the capital is"],
        "locality": "The capital of Spain is", "locality_target": "Madrid",
    }  # fmt: skip
    (fact,) = read_facts(write(tmp_path, row))
    assert fact.other_wordings == ("France's capital is", "In France, the capital is")
    assert fact.locality_target == "Madrid"


def test_every_wrong_line_is_reported_with_its_field_and_no_text(tmp_path: Path) -> None:
    path = write(
        tmp_path, GOOD, {"prompt": "Secret thing"}, "{not json", [1], {**GOOD, "subject": 7},
        {**GOOD, "target": 3}, {**GOOD, "target": " "}, GOOD, {**GOOD, "paraphrases": "x"},
        {**GOOD, "messages": []}, '{"prompt": "a b", "prompt": "a c", "target": "x"}',
        {"prompt": "...", "target": "x"}, {**GOOD, "locality_target": "Rome"},
        '{"prompt": "x \\ud800", "target": "y"}', '{"prompt": "x", "target": "y", "n": NaN}',
    )  # fmt: skip
    with pytest.raises(ForgetSetError) as caught:
        read_facts(path)
    message = str(caught.value)
    for expected in (
        "line 2: target: missing", "line 3: not JSON", "line 4: not an object",
        "line 5: subject: not a text", "line 6: target: not a text",
        "line 7: target: empty", "line 8: the same prompt and target as line 1",
        "line 9: paraphrases: not a list of texts", "line 10: messages: given beside prompt",
        "line 11: a field stands twice", "line 12: subject: missing",
        "line 13: locality_target: without locality", "line 14: prompt: not valid Unicode",
        "line 15: NaN",
    ):  # fmt: skip
        assert expected in message
    assert "14 problems" in message
    assert "Secret" not in message
    assert "Spain" not in message
    assert caught.value.exit_code == 11


def test_a_subject_by_another_name_is_found_by_the_rule_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {
        "prompt": "The capital of the Czech Republic is",
        "subject": "Czechia",
        "target": "Prague",
    }
    (fact,) = read_facts(write(tmp_path, row))
    assert fact.subject is None
    assert "line 1: subject does not stand in the prompt" in caplog.text
    assert "Czech" not in caplog.text


def test_many_problems_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ForgetSetError, match="and 10 more"):
        read_facts(write(tmp_path, *["{}"] * 15))


def test_messages(tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    (fact,) = read_facts(write(tmp_path, {"messages": ask, "target": "Paris", "subject": "France"}))
    assert fact.prompt is None
    assert fact.text == ask[0]["content"]
    assert fact.canonical()["messages"] == ask


@pytest.mark.parametrize(
    "messages",
    ["Hello", [], [{"role": "user"}], [{"role": "boss", "content": "x"}],
     [{"role": "assistant", "content": "x"}], [3]],
)  # fmt: skip
def test_wrong_messages(tmp_path: Path, messages: Any) -> None:
    with pytest.raises(ForgetSetError, match="line 1: messages"):
        read_facts(write(tmp_path, {"messages": messages, "target": "Paris"}))


def test_files_that_are_no_forget_set(tmp_path: Path) -> None:
    with pytest.raises(ForgetSetError, match="No such file"):
        read_facts(tmp_path / "missing.jsonl")
    with pytest.raises(ForgetSetError, match="directory"):
        read_facts(tmp_path)
    with pytest.raises(ForgetSetError, match="empty"):
        read_facts(write(tmp_path, "", ""))
    (tmp_path / "latin").write_bytes(b'{"prompt": "a",\n "target": "\xe9"}')
    with pytest.raises(ForgetSetError, match=r"not UTF-8 \(line 2\)"):
        read_facts(tmp_path / "latin")


def test_rows_instead_of_a_file_and_a_limit() -> None:
    rows = [{**GOOD, "target": str(i)} for i in range(5)]
    assert [fact.target for fact in read_facts(rows, limit=2)] == ["0", "1"]
    with pytest.raises(ForgetSetError, match="line 5: target"):
        read_facts([*rows[:4], {**GOOD, "target": ""}], limit=2)
    with pytest.raises(ForgetSetError, match="line 1: not an object"):
        read_facts(["x"])  # type: ignore[list-item]
    with pytest.raises(UsageError):
        read_facts(rows, limit=0)
