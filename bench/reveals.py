"""What does a patch file reveal? Somebody with the base and a list of candidates ranks them.

The measure is how much the patch changes the outputs at a candidate's subject, relative to the
outputs: no forget text is needed, and no access to the patched engine.

    python -m bench.reveals --model DIR --patch P.st --forget FORGET.jsonl --others FACTS.jsonl
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from patcher.patch import Patch
from patcher.unlearn.facts import Fact, read_facts
from patcher.unlearn.forward import keys
from patcher.unlearn.models import Model, load
from patcher.unlearn.prompts import encode_facts


def responses(model: Model, patch: Patch, facts: list[Fact]) -> list[float]:
    """Per fact: ``||L R W k|| / ||W k||`` at its subject, the largest over the modules."""
    coded = encode_facts(model.tokenizer, facts, model.max_tokens)
    layers = [i for i in range(model.layers) if model.module_name(i) in patch.deltas]
    inputs = keys(model, [c.prompt for c in coded], [c.subject for c in coded], layers)
    found = torch.zeros(len(facts), dtype=torch.float64)
    for layer in layers:
        delta = patch.deltas[model.module_name(layer)].to_torch()
        outputs = inputs[layer].double() @ model.weight(model.module_name(layer)).double().T
        read = outputs if delta.kind == "multiplicative" else inputs[layer].double()
        change = read @ delta.right.double().T @ delta.left.double().T
        found = torch.maximum(found, change.norm(dim=1) / outputs.norm(dim=1))
    return found.tolist()


def separation(inside: list[float], outside: list[float]) -> dict[str, Any]:
    """How well the two are told apart: the AUC, and how many of ``inside`` lead the list."""
    wins = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
    cut = sorted([*inside, *outside], reverse=True)[len(inside) - 1]
    return {
        "auc": wins / (len(inside) * len(outside)),
        "leading": sum(a >= cut for a in inside),
        "of": len(inside),
        "others": len(outside),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", required=True)
    parser.add_argument("--patch", required=True, type=Path)
    parser.add_argument("--forget", required=True, type=Path)
    parser.add_argument("--others", required=True, type=Path)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    model, patch = load(asked.model), Patch.read(asked.patch)
    forget = read_facts(asked.forget)
    subjects = {fact.subject for fact in forget}
    others = [fact for fact in read_facts(asked.others) if fact.subject not in subjects]
    outside = responses(model, patch, others)
    bare = [replace(fact, prompt=fact.subject) for fact in forget if fact.subject]
    told = {
        "with the prompts": separation(responses(model, patch, forget), outside),
        "with the subjects alone": separation(
            responses(model, patch, bare),
            responses(model, patch, [replace(f, prompt=f.subject) for f in others if f.subject]),
        ),
    }
    if asked.json:
        print(json.dumps(told, indent=2))
    for name, one in {} if asked.json else told.items():
        print(
            f"{name}: AUC {one['auc']:.4f}; {one['leading']} of {one['of']} forgotten ones lead"
            f" the list of {one['of'] + one['others']}"
        )


if __name__ == "__main__":
    main()
