from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_engine import FakeEngine, serving
from tests.small_patch import small_patch

# A shell's background job ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]

# `make test` runs two workers of pytest-xdist: engines one after another on the one, with both
# cores when they want them; everything else on the other, with what is left.
XDIST = "PYTEST_XDIST_WORKER" in os.environ
ENGINES = ("tests/engine/", "tests/test_bench_soak.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "engines" if nodeid.startswith(ENGINES) else nodeid.partition("::")[0]

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if XDIST:
        items.sort(key=lambda item: not item.nodeid.startswith(ENGINES))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if XDIST and not item.nodeid.startswith(ENGINES):
        import torch

        os.nice(19)
        torch.set_num_threads(1)  # two threads that wait for each other get nowhere beside vLLM's


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of SmolLM2-135M-Instruct as safetensors."""
    path = REPOSITORY / ".models" / "smollm2-135m-instruct"
    assert (path / "model.safetensors").is_file(), "no real model: run `make model`"
    return path


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    """An engine that isn't one: real HTTP, state in memory."""
    with serving() as engine:
        yield engine


@pytest.fixture
def patch_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.st"
    small_patch().write(path)
    return path
