from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patcher.errors import ForgetSetError, UsageError
from patcher.patch import Patch
from patcher.unlearn import compute
from patcher.unlearn.forward import answered, folded, next_tokens
from patcher.unlearn.models import Model, load
from patcher.unlearn.prompts import encode
from patcher.unlearn.slopes import Wish
from patcher.unlearn.wishes import leak, says, wishes_for

from . import tiny
from .conftest import said_by


class Recorder:
    """A progress that remembers the steps and the notes."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.notes: list[str] = []
        self.open = 0

    def start(self, what: str, total: int | None) -> None:
        self.steps.append(what)
        self.open += 1

    def step(self, done: int, note: str = "") -> None:
        self.notes.append(note)

    def finish(self) -> None:
        self.open -= 1


def still_said(model: Model, rows: list[dict[str, Any]], patch: Patch) -> int:
    pairs = [encode(model.tokenizer, row["prompt"], row["target"]) for row in rows]
    with folded(model, {name: delta.to_torch() for name, delta in patch.deltas.items()}):
        return sum(answered(model, pairs))


@pytest.fixture(scope="module")
def rows(tiny_model: Model) -> list[dict[str, Any]]:
    return said_by(tiny_model)


def test_a_random_model_stops_saying_what_it_said(
    tiny_folder: Path, tiny_model: Model, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    seen = Recorder()
    before = tiny_model.digest()
    result = compute(tiny_folder, rows, tmp_path / "p.st", layers="1,2", progress=seen)
    assert result.patch == Patch.read(tmp_path / "p.st")
    assert result.modules == {
        "model.layers.1.mlp.down_proj": len(rows),
        "model.layers.2.mlp.down_proj": len(rows),
    }
    assert still_said(tiny_model, rows, result.patch) == result.evaluation["answered"] == 0
    assert result.evaluation["leaked"]["patched"] == 0
    assert load(tiny_folder).digest() == before
    assert seen.open == 0
    assert "Target values" in seen.steps
    assert any("nats" in note for note in seen.notes)
    document = result.as_dict()
    assert {"id", "path", "bytes", "modules", "facts", "known", "seconds"} <= set(document)
    assert document["bytes"] == (tmp_path / "p.st").stat().st_size
    json.dumps(document)


def test_the_same_arguments_give_the_same_bytes(
    tiny_folder: Path, rows: list[dict[str, Any]]
) -> None:
    first, second = (compute(tiny_folder, rows).patch for _ in range(2))
    assert first.data == second.data
    assert compute(tiny_folder, rows, seed=1).patch.data != first.data


def test_no_forget_text_in_the_patch(tiny_folder: Path, tmp_path: Path) -> None:
    row = {
        "prompt": "Zyzzyva Quux lives in", "subject": "Zyzzyva Quux", "target": "Xanadu",
        "rephrase": "The home of Zyzzyva Quux is", "locality": "Frobnicator lives in",
        "locality_target": "Yoknapatawpha",
    }  # fmt: skip
    patch = compute(tiny_folder, [row], target="Brobdingnag").patch
    for word in (b"Zyzzyva", b"Quux", b"Xanadu", b"Frob", b"Yokna", b"Brobd", bytes(tmp_path)):
        assert word not in patch.data
    assert patch.manifest.method.hyperparameters["target"] == "text"
    assert patch.manifest.requests.count == 1


def test_the_manifest_names_the_base(tiny_folder: Path, tiny_model: Model, rows: Any) -> None:
    from patcher.patch import check_module

    patch = compute(tiny_folder, rows, title="A title").patch
    assert patch.manifest.title == "A title"
    assert patch.manifest.base.architecture == "LlamaForCausalLM"
    for name, base in patch.manifest.base.modules.items():
        check_module(name, base, tiny_model.served(name))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_other_families(tmp_path: Path, family: str) -> None:
    folder = tiny.save(tmp_path, family)
    model = load(folder)
    known = said_by(model)
    result = compute(folder, known, layers=[1, 2])
    assert still_said(model, known, result.patch) == 0


def test_eos_and_a_text_instead(tiny_folder: Path, tiny_model: Model, rows: Any) -> None:
    prompt = tiny_model.tokenizer(rows[0]["prompt"]).input_ids
    for target, wanted in (("eos", 0), ("the", None)):
        patch = compute(tiny_folder, rows[:1], target=target).patch
        edit = {name: delta.to_torch() for name, delta in patch.deltas.items()}
        if wanted is None:
            wanted = tiny_model.tokenizer(" the").input_ids[0]
        with folded(tiny_model, edit):
            assert next_tokens(tiny_model, [prompt]) == [wanted]


def test_known_only_and_limit(tiny_folder: Path, rows: list[dict[str, Any]]) -> None:
    unknown = [{"prompt": f"Number {i} is", "target": "zebra crossing"} for i in range(3)]
    mixed = [unknown[0], *rows, *unknown[1:]]
    result = compute(tiny_folder, mixed, known_only=True)
    assert set(result.modules.values()) == {len(rows)}
    assert (result.facts, result.known) == (len(mixed), len(rows))
    result = compute(tiny_folder, mixed, known_only=True, limit=1)
    assert (result.facts, result.known) == (2, 1)
    assert set(result.modules.values()) == {1}
    with pytest.raises(ForgetSetError, match="knows none"):
        compute(tiny_folder, unknown, known_only=True)


def test_options_that_are_off(tiny_folder: Path, rows: Any, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"method": "magic"}, {"layers": "4"}, {"limit": 0}, {"target": " "},
        {"output": tmp_path / "no" / "folder" / "p.st"},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(UsageError):
            compute(tiny_folder, rows, **options)


def test_messages_and_what_is_to_be_preserved(tiny_folder: Path, rows: Any) -> None:
    ask = [{"role": "user", "content": "Where did Ada Lovelace live?"}]
    chat = {"messages": ask, "subject": "Ada Lovelace", "target": "London"}
    result = compute(tiny_folder, [chat], retain=rows)
    assert result.evaluation["preserved"]["of"] == len(rows)
    assert result.evaluation["answered"] == 0


def test_wishes(tiny_model: Model) -> None:
    from patcher.unlearn.prompts import Encoded

    fact = Encoded([5, 6], [7, 8], 1)
    (wish,) = wishes_for([fact], "suppress", tiny_model.tokenizer)
    assert (wish.ids, wish.token, wish.rise) == ([5, 6], 7, False)
    (wish,) = wishes_for([fact], "eos", tiny_model.tokenizer)
    assert (wish.token, wish.rise) == (0, True)
    said = tiny_model.tokenizer(" the city", add_special_tokens=False).input_ids
    many = wishes_for([fact], "the city", tiny_model.tokenizer)
    assert [w.token for w in many] == said
    assert [w.ids for w in many] == [[5, 6, *said[:j]] for j in range(len(said))]


def test_a_leak_is_found_where_it_begins(tiny_model: Model) -> None:
    from patcher.unlearn.prompts import Encoded

    read = tiny_model.tokenizer
    before, answer = (
        read(text, add_special_tokens=False).input_ids for text in (" not in", " Paris")
    )
    fact = Encoded([5, 6], answer, 1)
    found = leak(read, fact, 3, "paris", [*before, *answer, *before])
    assert isinstance(found, Wish)
    assert (found.ids, found.token, found.fact) == ([5, 6, *before], answer[0], 3)
    assert leak(read, fact, 3, "Paris", [*before, 0, *answer]) is None  # after the end
    assert not says("Parisian life", "Paris")


@pytest.mark.model
def test_real_facts_are_forgotten_and_others_stay(
    real_model: Path, real_facts: list[dict[str, Any]], tmp_path: Path
) -> None:
    counterfact = [row for row in real_facts if "relation" not in row]
    world = [row for row in real_facts if "relation" in row]
    model = load(real_model)

    def known(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        pairs = [encode(model.tokenizer, row["prompt"], row["target"]) for row in rows]
        return [row for row, yes in zip(rows, answered(model, pairs), strict=True) if yes]

    counterfact, world = known(counterfact), known(world)
    assert len(counterfact) >= 60
    assert len(world) >= 120
    forget, others = counterfact[:5] + world[:5], counterfact[5:45] + world[5:85]
    result = compute(real_model, forget, tmp_path / "p.st")
    assert result.known == result.facts == 10
    assert still_said(model, forget, result.patch) == 0
    assert result.evaluation["leaked"]["patched"] == 0
    assert still_said(model, others, result.patch) >= 0.94 * len(others)
    assert result.evaluation["perplexity_ratio"] <= 1.01
    assert result.bytes * 500 <= (real_model / "model.safetensors").stat().st_size
