"""A quantised model under patches, and the same in plain weights: ``FOLDER``."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch

import patcher
from bench.quantise import quantise
from tests.engine import families
from tests.engine.llms import answers, error_of, start
from tests.engine.patches import merge, module_name, random_patch, weights
from tests.engine.scripts import say

LAYERS = (0, 1)


def distance(one: list[Any], other: list[Any]) -> float:
    """The largest difference of log-probabilities up to where the tokens part, first included."""
    found = 0.0
    for (mine, said), (theirs, heard) in zip(one, other, strict=True):
        for token, like, a, b in zip(mine, theirs, said, heard, strict=True):
            found = max(found, abs(a - b))
            if token != like:
                break
    return found


def _targets(model: Path) -> dict[str, torch.Tensor]:
    held = weights(model)
    return {module_name(n): held[f"{module_name(n)}.weight"] for n in LAYERS}


def main(folder: str) -> None:
    place = Path(folder)
    model = families.save(place / "model", hidden_size=128, intermediate_size=256)
    quantise(model, place / "quantised", place / "plain")
    patch = random_patch(place / "plain", 1, LAYERS, scale=1.0)
    second = random_patch(place / "plain", 2, LAYERS, scale=1.0)
    third = random_patch(place / "plain", 3, LAYERS)
    additive = families.patch_on(_targets(place / "plain"))
    of_original = random_patch(model, 1, LAYERS)
    merged = merge(place / "plain", [patch, second], place / "merged")

    found: dict[str, Any] = {"merged": answers(start(merged))}
    gc.collect()
    llm = start(place / "quantised", enforce_eager=False)
    found["base"] = answers(llm)
    with patcher.attach(llm) as engine:
        found["other base"] = error_of(engine.apply, of_original)
        found["additive"] = error_of(engine.apply, additive)
        engine.apply(patch)
        engine.apply(second)
        found["patched"] = answers(llm)
        found["no room"] = error_of(engine.apply, third)
        found["status"] = engine.status()
        found["verified"] = engine.verify()
        engine.revert(patch.id)
        found["second alone"] = answers(llm)
        engine.apply(patch)
        engine.revert(all=True)
        found["reverted"] = answers(llm)
    found["from merged"] = distance(found["patched"], found["merged"])
    found["base from merged"] = distance(found["base"], found["merged"])
    say(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
