"""The public names, that they load lazily, and that the examples run."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import patcher
from tests.fake_engine import TOKEN, FakeEngine
from tests.unlearn import tiny
from tests.unlearn.conftest import said_by

HEAVY = ("torch", "vllm", "transformers", "httpx", "rich", "pydantic", "numpy", "safetensors")
WITH_EXAMPLES = (
    "patcher.address",
    "patcher.doctor",
    "patcher.cli.output",
    "patcher.text",
    "patcher.durations",
)


def test_the_public_names_are_these() -> None:
    assert patcher.__all__ == [
        "AlreadyAppliedError",
        "AmbiguousIdError",
        "BarsNotMetError",
        "BaseMismatchError",
        "Engine",
        "EngineRefusedError",
        "EngineUnreachableError",
        "ForgetSetError",
        "FormatVersionError",
        "GuardBreachedError",
        "InputError",
        "InvalidPatchError",
        "ModelError",
        "NotEnoughMemoryError",
        "NumericalError",
        "Patch",
        "PatcherError",
        "PermissionDeniedError",
        "RoleTooWeakError",
        "ShippingError",
        "StackChangedError",
        "StackConflictError",
        "StackRacedError",
        "TrustError",
        "UnknownPatchError",
        "UsageError",
        "VerificationError",
        "__version__",
        "attach",
        "compute",
        "evaluate",
    ]


def test_every_public_name_is_there_listed_and_documented() -> None:
    for name in patcher.__all__:
        value = getattr(patcher, name)
        assert name in dir(patcher)
        if name in ("compute", "evaluate", "Patch", "Engine"):
            assert ">>>" in (value.__doc__ or ""), name


def test_compute_and_evaluate_are_functions_whatever_was_imported_before() -> None:
    importlib.import_module("patcher.unlearn")
    importlib.import_module("patcher.evaluation")
    assert callable(patcher.compute)
    assert callable(patcher.evaluate)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(patcher, "nonsense")  # noqa: B009 - mypy knows that it isn't there


def test_importing_patcher_imports_nothing_heavy() -> None:
    script = f"import sys, patcher; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_the_client_does_not_import_torch_or_transformers() -> None:
    script = "import sys, patcher; patcher.Engine; patcher.Patch; "
    script += "print([n for n in ('torch', 'vllm', 'transformers') if n in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_in_docstrings_run(module: str) -> None:
    outcome = doctest.testmod(importlib.import_module(module))
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the examples name: ``my-model``, ``forget.jsonl``."""
    from patcher.unlearn.models import load

    model = tiny.save(tmp_path / "my-model")
    facts = said_by(load(model))[:2]
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    monkeypatch.setenv("PATCHER_SALT_FILE", str(tmp_path / "salt"))
    monkeypatch.setenv("PATCHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_public_examples_run(prepared: Path, fake: FakeEngine) -> None:
    for name in ("compute", "evaluate", "Patch", "Engine"):
        text = (getattr(patcher, name).__doc__ or "").replace("http://127.0.0.1:8000", fake.url)
        text = text.replace('token="..."', f"token={TOKEN!r}")
        example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
        assert example.examples, name
        outcome = doctest.DocTestRunner(verbose=False).run(example)
        assert outcome.failed == 0, name
