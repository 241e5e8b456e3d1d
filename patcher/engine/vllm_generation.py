"""Asking the engine from inside the API server, read in vLLM 0.32.0.

The renderer that its own routes use (``renderers/base.py``) makes tokens, ``generate``
(``v1/engine/async_llm.py``) answers. Nothing here reads the prefix cache.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any


def can_answer(client: Any) -> bool:
    """Whether requests can be put to the engine from here: not to a ``vllm.LLM`` of a script."""
    return hasattr(client, "generate")


def engines(client: Any) -> list[int | None]:
    """The data-parallel engines that can be asked one by one; ``[None]`` where there is one."""
    count = len(getattr(getattr(client, "engine_core", None), "core_engines", ()))
    return [None] if count < 2 else list(range(count))


def most_tokens(client: Any) -> int:
    """How many tokens a prompt and its answer may have together."""
    return int(client.model_config.max_model_len)


def gives_log_probabilities(client: Any) -> bool:
    """Whether what vLLM calls log-probabilities are such (``--logprobs-mode``), not logits."""
    return str(client.model_config.logprobs_mode).endswith("logprobs")


def chat(client: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Messages through the tokenizer's own chat template, up to where the answer begins.

    Raises what the template raises, whatever that is.
    """
    text: str = client.renderer.get_tokenizer().apply_chat_template(
        [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
    )
    return text


async def encode(client: Any, text: str, *, special: bool = True) -> list[int]:
    """The ids of ``text``, by vLLM's tokenizer threads; ``special``: with the tokens around it."""
    params = replace(client.renderer.default_cmpl_tok_params, add_special_tokens=special)
    (rendered,) = await client.renderer.render_cmpl_async([{"prompt": text}], params)
    return list(rendered["prompt_token_ids"])


async def continuation(client: Any, ids: Sequence[int], tokens: int, engine: int | None) -> str:
    """What the engine says greedily after ``ids``, in at most so many tokens."""
    answer = await _ask(client, ids, engine, max_tokens=tokens)
    return str(answer.outputs[0].text)


async def log_probabilities(
    client: Any, ids: Sequence[int], first: int, engine: int | None
) -> list[float]:
    """The log-probability, in nats, of each id from place ``first`` (at least 1) on."""
    # 0 asks for the prompt's own tokens and no others; one more has to be generated.
    answer = await _ask(client, ids, engine, max_tokens=1, prompt_logprobs=0)
    places = answer.prompt_logprobs
    return [float(places[at][ids[at]].logprob) for at in range(first, len(ids))]


async def _ask(client: Any, ids: Sequence[int], engine: int | None, **how: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0,
        skip_reading_prefix_cache=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **how,
    )
    (prompt,) = await client.renderer.render_cmpl_async([{"prompt_token_ids": list(ids)}])
    name = f"patcher-guard-{secrets.token_hex(8)}"
    answers = [
        answer async for answer in client.generate(prompt, params, name, data_parallel_rank=engine)
    ]
    return answers[-1]  # the final one, and only that
