"""The versions of vLLM whose internals the adapters were read in and tested with."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from patcher.engine.settings import is_set
from patcher.errors import EngineRefusedError

FIRST, BEYOND = (0, 31), (0, 33)  # from the one, up to but without the other
RANGE = "0.31 and 0.32"
FORCE = "PATCHER_FORCE_VLLM"
logger = logging.getLogger("vllm.patcher")


def is_known(version: str) -> bool:
    """Whether patcher was tested with vLLM ``version``, as ``vllm.__version__`` has it."""
    parts = version.split("+")[0].split(".")
    numbers = tuple(int(part) for part in parts[:2] if part.isdigit())
    return FIRST <= numbers < BEYOND


def check_vllm(version: str, environment: Mapping[str, str] = os.environ) -> None:
    """Let a known version pass, and with a warning one that is forced.

    Raises :class:`EngineRefusedError` for a version that nobody tested, unless it is forced: a
    seam that moved could write to a place that nothing reads any more.
    """
    if is_known(version):
        return
    if is_set(FORCE, environment):
        logger.warning("patcher: vLLM %s is forced; tested was %s", version, RANGE)
        return
    raise EngineRefusedError(
        f"This is vLLM {version}; patcher was tested with {RANGE}.",
        f"Install one of these, or set {FORCE}=1 and look at `patcher verify` after a change.",
    )
