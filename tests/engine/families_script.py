"""Each family in turn: vLLM patched, and transformers with the same patch: ``FOLDER``."""

from __future__ import annotations

import gc
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import patcher
from tests.engine import families
from tests.engine.llms import PROMPTS, TOKENS, answers, start
from tests.engine.scripts import say


def greedy(network: Any) -> list[Any]:
    """What transformers says to the prompts: tokens and their log-probabilities."""
    found = []
    for prompt in PROMPTS:
        tokens: list[int] = []
        for _ in range(TOKENS):
            tokens.append(int(rows(network, [*prompt, *tokens])[-1].argmax()))
        found.append([tokens, given(network, prompt, tokens)])
    return found


def given(network: Any, prompt: list[int], tokens: list[int]) -> list[float]:
    """The log-probability of each of the tokens after the ones before it."""
    places = range(len(prompt) - 1, len(prompt) + len(tokens) - 1)
    found = rows(network, [*prompt, *tokens])
    return [float(found[p, t]) for p, t in zip(places, tokens, strict=True)]


def rows(network: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities ``[len(ids), vocabulary]``."""
    with torch.inference_mode():
        found: torch.Tensor = network(torch.tensor([ids])).logits[0].log_softmax(-1)
    return found


def distance(one: list[Any], other: list[Any]) -> float:
    """The largest difference of two log-probabilities of one token; tokens must be the same."""
    if [tokens for tokens, _ in one] != [tokens for tokens, _ in other]:
        return 1e9
    pairs = zip(one, other, strict=True)
    return max(abs(a - b) for (_, x), (_, y) in pairs for a, b in zip(x, y, strict=True))


def compare(folder: Path, family: str) -> dict[str, Any]:
    model = families.save(folder / family, family, torch.float32)
    maker: Any = AutoModelForCausalLM
    # Transformers first: where vLLM serves its classes, it changes them.
    network = maker.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    held = families.targets(network)
    patch = families.patch_on(held)
    base_must = greedy(network)
    before = {name: weight.clone() for name, weight in held.items()}
    families.fold_into(held, patch)
    patched_must = greedy(network)
    for name, weight in before.items():
        held[name].copy_(weight)
    without = [
        [tokens, given(network, p, tokens)]
        for p, (tokens, _) in zip(PROMPTS, patched_must, strict=True)
    ]

    llm = start(model, dtype="float32")
    base = answers(llm)
    with patcher.attach(llm) as engine:
        engine.apply(patch)
        patched = answers(llm)
        verified = engine.verify()
    return {
        "base": distance(base, base_must),
        "patched": distance(patched, patched_must),
        "without patch": distance(patched, without),
        "reverted exactly": answers(llm) == base,
        "verified": verified,
        "served by": type(llm.llm_engine.model_executor.driver_worker.get_model()).__name__,
    }


def spare_the_inspection() -> None:
    """Load the models' classes here: vLLM would start a process to look at each."""
    from vllm import ModelRegistry

    for name in families.CLASSES:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def main(folder: str, *chosen: str) -> None:
    spare_the_inspection()
    found: dict[str, Any] = {}
    for family in chosen or families.FAMILIES:
        try:
            found[family] = compare(Path(folder), family)
        except Exception:  # one family's trouble is not the others'
            found[family] = {"error": traceback.format_exc()}
        gc.collect()
    say(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
