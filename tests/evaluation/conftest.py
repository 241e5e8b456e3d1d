"""One evaluation with all probes, of the model whose probabilities are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from patcher.evaluation import EvaluationReport, evaluate
from patcher.patch import Patch
from patcher.unlearn.models import Model, load

from . import bigram

WRONG = {"wrong": ["on", "be"], "restated": "the"}
HOPS = {
    "multihop": [
        {"prompt": "One thing and then A", "targets": ["zebra", "the"]},
        {"prompt": "One thing and then D", "targets": ["of"]},
    ]
}
NEAR = {"neighbours": [{"prompt": "So it is D", "target": "to"}, {"prompt": "x B", "target": "of"}]}


@pytest.fixture(scope="session")
def bigram_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bigram.save(tmp_path_factory.mktemp("bigram"))


@pytest.fixture(scope="session")
def bigram_model(bigram_folder: Path) -> Model:
    return load(bigram_folder)


@pytest.fixture(scope="session")
def forgetting(bigram_model: Model) -> Patch:
    return bigram.forgetting(bigram_model)


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """The six facts; what only some probes ask is with the first."""
    more = {**WRONG, **HOPS, **NEAR, "paraphrases": ["Her home is A", "Her work is D"]}
    return [{**bigram.FACTS[0], **more}, *bigram.FACTS[1:]]


@pytest.fixture(scope="session")
def others() -> list[dict[str, Any]]:
    """Facts that stay: of the relation "home", of the subject Ada Vell, and one unknown."""
    return [
        {"prompt": "Gil lives in D", "subject": "Gil", "target": "to", "relation": "home"},
        {"prompt": "Hob lives in C", "subject": "Hob", "target": "in", "relation": "home"},
        {"prompt": "Ada Vell likes B", "subject": "Ada Vell", "target": "of", "relation": "taste"},
        {"prompt": "Ivo likes E", "subject": "Ivo", "target": "was", "relation": "taste"},
        {"prompt": "Ivo likes x", "subject": "Ivo", "target": "was", "relation": "taste"},
    ]


@pytest.fixture(scope="session")
def report(
    bigram_folder: Path,
    forgetting: Patch,
    rows: list[dict[str, Any]],
    others: list[dict[str, Any]],
) -> EvaluationReport:
    return evaluate(bigram_folder, patches=[forgetting], forget=rows, retain=others, probes="all")
