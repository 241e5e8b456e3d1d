"""Model families: vLLM with a patch says what transformers says with the same patch merged."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.families import FAMILIES
from tests.engine.scripts import run_script

pytestmark = pytest.mark.engine

# Both compute in float32, in different orders: they differed by at most 1.2e-5, patched or not.
# These patches moved log-probabilities by 0.26 to 4.6.
SAME, OTHER = 1e-4, 0.1


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All families, one engine after another in one process."""
    folder = tmp_path_factory.mktemp("families")
    return run_script("families_script", folder, VLLM_ENABLE_V1_MULTIPROCESSING="0")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_patched_vllm_equals_patched_transformers(found: dict[str, Any], family: str) -> None:
    of = found[family]
    assert "error" not in of, of["error"]
    assert of["base"] < SAME
    assert of["without patch"] > OTHER, "the patch must change what is said, or this shows nothing"
    assert of["patched"] < SAME
    assert of["verified"]["ok"]
    assert len(of["verified"]["modules"]) == 2
    assert of["reverted exactly"]
