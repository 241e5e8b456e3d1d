"""The guards' file: what it may say, and that whatever is wrong is told without its texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patcher.client import Engine
from patcher.errors import InputError
from patcher.guards import MAX_BYTES, MAX_GUARDS, read_guards
from tests.fake_engine import TOKEN, FakeEngine
from tests.small_patch import small_patch

SECRET = "a-text-that-is-nobodys-business"
GOOD: dict[str, Any] = {"prompt": "The capital of France is", "must_contain": "Paris"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_guards_come_in_order_and_are_called_by_their_place(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", GOOD, "", {**GOOD, "name": "mine", "tokens": 8})
    read = read_guards([path, {"text": "some text", "max_ratio": 1.05}])
    assert [one["name"] for one in read] == ["g.jsonl line 1", "mine", "guard 2"]
    assert read[0] == {**GOOD, "name": "g.jsonl line 1", "tokens": 24}
    assert read_guards(path) == read[:2]
    assert read_guards(read) == read, "what was read may be given again"


WRONG: dict[str, tuple[object, str]] = {
    "not json": ("{", "not JSON"),
    "not an object": ("[1]", "not an object"),
    "a name twice": ('{"prompt": "a", "prompt": "b", "must_contain": "c"}', "twice"),
    "not a number": ('{"text": "a b", "max_loss": NaN}', "NaN"),
    "no bound": ({"prompt": SECRET}, "sets no bound"),
    "no subject": ({"must_contain": SECRET}, "exactly one"),
    "two subjects": ({**GOOD, "text": SECRET}, "exactly one"),
    "unknown field": ({**GOOD, "must_countain": SECRET}, "must_countain"),
    "a text's bound on a prompt": ({"prompt": SECRET, "max_loss": 1}, "does not go with prompt"),
    "a prompt's bound on a text": ({"text": SECRET, "must_contain": "x"}, "not go with text"),
    "target alone": ({**GOOD, "target": SECRET}, "target goes with"),
    "probability alone": ({"prompt": SECRET, "max_probability": 0.1}, "target goes with"),
    "probability above one": (
        {"prompt": SECRET, "target": SECRET, "max_probability": 1.5},
        "max_probability",
    ),
    "loss of nothing": ({"text": SECRET, "max_loss": 0}, "max_loss"),
    "number as text": ({"text": SECRET, "max_loss": "4"}, "max_loss"),
    "tokens": ({**GOOD, "tokens": 513}, "tokens"),
    "blank": ({"prompt": SECRET, "must_contain": "  "}, "must_contain: is empty"),
    "half a pair": ('{"prompt": "\\ud800", "must_contain": "x"}', "line 2"),
    "role": ({"messages": [{"role": SECRET, "content": "x"}], "must_contain": "x"}, "role"),
    "escapes in a name": ({**GOOD, "name": "\x1b[31m"}, "name: has characters"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_guard_is_named_by_line_and_cause_and_not_quoted(
    tmp_path: Path, wrong: str
) -> None:
    row, cause = WRONG[wrong]
    path = write(tmp_path / "g.jsonl", GOOD, row)
    with pytest.raises(InputError) as caught:
        read_guards(path)
    assert "g.jsonl line 2" in caught.value.message
    assert cause in caught.value.message
    assert caught.value.cure
    assert SECRET not in str(caught.value)


def test_every_wrong_line_is_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", *["{}"] * 25)
    with pytest.raises(InputError, match=r"line 1: .*line 20: .*and 5 more"):
        read_guards(path)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_guards(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no guard"):
        read_guards(write(tmp_path / "empty.jsonl", "", ""))
    (tmp_path / "large.jsonl").write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(InputError, match="larger"):
        read_guards(tmp_path / "large.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(InputError, match="line 1: not UTF-8"):
        read_guards(tmp_path / "latin.jsonl")
    with pytest.raises(InputError, match=f"at most {MAX_GUARDS}"):
        read_guards([GOOD] * (MAX_GUARDS + 1))


def test_a_client_checks_guards_before_any_request(fake: FakeEngine) -> None:
    with Engine(fake.url, TOKEN) as engine:
        for change in (
            lambda: engine.apply(small_patch(), guards={"prompt": "p"}),
            lambda: engine.revert(all=True, guards=[{"prompt": "p"}]),
        ):
            with pytest.raises(InputError):
                change()
    assert fake.requests == []
