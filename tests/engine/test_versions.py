"""Which versions of vLLM the adapters work with."""

from __future__ import annotations

import pytest
import vllm

from patcher.engine.versions import FORCE, check_vllm, is_known
from patcher.errors import EngineRefusedError


def test_the_version_that_these_tests_run_on_is_a_known_one() -> None:
    assert is_known(vllm.__version__)


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("0.32.0", True),
        ("0.32.4", True),
        ("0.32.1rc1+cpu", True),
        ("0.31.9", True),
        ("0.30.1", False),
        ("0.33.0", False),
        ("1.32.0", False),
        ("dev", False),
    ],
)
def test_other_versions_are_refused_unless_forced(
    version: str, known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if known:
        check_vllm(version, {})
        return
    with pytest.raises(EngineRefusedError, match=f"This is vLLM {version}") as caught:
        check_vllm(version, {FORCE: "0"})
    assert FORCE in caught.value.cure
    check_vllm(version, {FORCE: "1"})
    assert "forced" in caplog.text
