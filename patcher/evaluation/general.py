"""General utility through lm-evaluation-harness, where the package ``lm_eval`` is installed.

Written to the harness's documented Python interface (``simple_evaluate`` with an
``HFLM`` around a loaded model, lm_eval 0.4). It is no dependency of patcher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..errors import UsageError
from ..unlearn.models import Model


def checked(tasks: Sequence[str]) -> list[str]:
    """The tasks' names, once it is certain that they can be run.

    Raises:
        UsageError: an empty name, or the package is not installed.
    """
    names = [task.strip() for task in tasks]
    if not all(names):
        raise UsageError("A task of lm_eval has no name.", "Give names with commas between them.")
    if names and find_spec("lm_eval") is None:
        raise UsageError(
            "lm-evaluation-harness is not installed.",
            "Install it beside patcher: pip install 'lm_eval[hf]'.",
        )
    return names


def run(model: Model, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Each task's numbers on the weights as they are now.

    Raises:
        UsageError: the harness refuses a task or fails.
    """
    try:
        harness: Any = import_module("lm_eval")
        wrapper: Any = import_module("lm_eval.models.huggingface")
        wrapped = wrapper.HFLM(pretrained=model.network, tokenizer=model.tokenizer)
        found = harness.simple_evaluate(model=wrapped, tasks=list(tasks), bootstrap_iters=1000)
    except Exception as error:  # whatever the harness and its data sets raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"lm_eval failed: {reason[:300]}",
            "Check the tasks' names, and that their data is here.",
        ) from error
    return {task: _numbers(values) for task, values in found["results"].items()}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What is a number; ``acc,none`` becomes ``acc``."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
