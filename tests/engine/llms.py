"""What the scripts of the offline tests share: a small ``vllm.LLM``, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from patcher.errors import PatcherError
from tests.engine.families import CONTEXT

TOKENS = 16  # of an answer
LONG = 350  # of one that a change meets under way; with its prompt it fills the context
#: Token ids; the first two share more than a block of the prefix cache (128 tokens on CPU).
PROMPTS = [[*range(20, 160), 7], [*range(20, 160), 9, 11], [200, 31, 8]]


def start(model: Path | str, **options: Any) -> Any:
    """A ``vllm.LLM`` in eager mode."""
    from vllm import LLM

    settings = {"enforce_eager": True, "max_model_len": CONTEXT, "disable_log_stats": True}
    return LLM(str(model), **{**settings, **options})


def greedy(tokens: int = TOKENS) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, logprobs=1, ignore_eos=True)


def answers(llm: Any, **more: Any) -> list[Any]:
    """Greedy answers, one prompt after another: tokens and their log-probabilities.

    To be compared where both times the prefix cache was empty, or both times held the prompts.
    """
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    outputs = [llm.generate(p, greedy(), use_tqdm=False, **more)[0].outputs[0] for p in prompts]
    return [told(output) for output in outputs]


def told(output: Any) -> Any:
    """An answer as tokens and log-probabilities, exact in JSON."""
    ids = list(output.token_ids)
    return [ids, [step[i].logprob for i, step in zip(ids, output.logprobs, strict=True)]]


def error_of(call: Callable[..., object], *args: Any, **options: Any) -> list[str]:
    """Code, message and cure of the error that the call raises."""
    try:
        call(*args, **options)
    except PatcherError as error:
        return [error.code, error.message, error.cure]
    return []
