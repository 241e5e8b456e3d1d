from __future__ import annotations

from pathlib import Path

import pytest

from tests.unlearn import tiny


@pytest.fixture(autouse=True)
def own_places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Salt of the tests' own, and a fixed time."""
    monkeypatch.setenv("PATCHER_SALT_FILE", str(tmp_path_factory.getbasetemp() / "salt"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1750000000")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in bfloat16, in one file."""
    return tiny.save(tmp_path_factory.mktemp("llama"))
