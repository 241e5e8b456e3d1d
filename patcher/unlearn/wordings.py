"""Other wordings of a fact, found among those that ship (docs/methods.md, "Other wordings").

``data/wordings.jsonl`` holds wordings of some fifty relations, written for patcher.
Which of them ask for a fact, the model itself tells: those after which it gives the
answer, or nearly. So a fact that none of them fits simply gets none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files

import torch

from .facts import Fact
from .forward import batches, hidden, logits, pad
from .models import Model
from .progress import Progress
from .prompts import Encoded, encode_fact
from .reference import subject_of

NEAR = 6  # relations whose wordings are tried, by the likeness of their words
LIKELY = -2.5  # log-odds of the answer's first token from which a wording asks for it


@cache
def shipped_wordings() -> tuple[tuple[str, ...], ...]:
    """The wordings by relation; ``{}`` stands for the subject."""
    text = files(__package__).joinpath("data/wordings.jsonl").read_text("utf-8")
    return tuple(tuple(json.loads(line)["wordings"]) for line in text.splitlines())


def other_wordings(
    model: Model, facts: Sequence[Fact], each: int, progress: Progress
) -> list[list[Fact]]:
    """Of every fact at most ``each`` others that ask the same in other words, likeliest first.

    Facts as chat messages get none. What is looked at is the model as it is.
    """
    near = _near(model, facts)
    tried: list[tuple[int, Fact, Encoded]] = []
    for i, fact in enumerate(facts):
        if fact.prompt is None:
            continue
        subject = subject_of(fact)
        for wording in near[i]:
            prompt = wording.replace("{}", subject)
            if prompt != fact.prompt and fact.target.casefold() not in prompt.casefold():
                other = replace(fact, prompt=prompt, subject=subject)
                tried.append((i, other, encode_fact(model.tokenizer, other)))
    odds = _odds(model, [coded for _, _, coded in tried], progress)
    found: list[list[tuple[float, Fact]]] = [[] for _ in facts]
    for (i, other, _), value in zip(tried, odds, strict=True):
        if value >= LIKELY:
            found[i].append((value, other))
    return [[fact for _, fact in sorted(own, key=lambda o: -o[0])[:each]] for own in found]


@torch.no_grad()
def _near(model: Model, facts: Sequence[Fact]) -> list[list[str]]:
    """By fact the wordings of the relations that sound most like its prompt."""
    relations = shipped_wordings()
    ours = torch.stack([_sound(model, [w.replace("{}", " ") for w in ws]) for ws in relations])
    middle = ours.mean(0)
    ours = torch.nn.functional.normalize(ours - middle, dim=1)
    kept: dict[str, list[str]] = {}
    result = []
    for fact in facts:
        words = fact.prompt.replace(subject_of(fact), " ") if fact.prompt is not None else ""
        if words not in kept:
            like = ours @ (_sound(model, [words]) - middle)
            best = like.topk(min(NEAR, len(ours))).indices.tolist()
            kept[words] = [wording for index in best for wording in relations[index]]
        result.append(kept[words])
    return result


def _sound(model: Model, texts: Sequence[str]) -> torch.Tensor:
    """The mean of the texts' input embeddings, ``[d]``."""
    ids = [i for t in texts for i in model.tokenizer(t, add_special_tokens=False).input_ids]
    table: torch.Tensor = model.network.get_input_embeddings().weight
    return table[ids].float().mean(0) if ids else torch.zeros_like(table[0]).float()


@torch.no_grad()
def _odds(model: Model, asked: Sequence[Encoded], progress: Progress) -> list[float]:
    """Log-odds of each answer's first token at the end of its prompt."""
    result = [0.0] * len(asked)
    done = 0
    progress.start("Other wordings", len(asked))
    for group in batches([len(coded.prompt) for coded in asked]):
        states = hidden(model, pad([asked[i].prompt for i in group], model.device))
        last = [len(asked[i].prompt) - 1 for i in group]
        scores = logits(model, states[list(range(len(group))), last]).log_softmax(-1)
        for row, i in enumerate(group):
            own = scores[row, asked[i].answer[0]].double()
            result[i] = float(own - torch.log1p(-own.exp()))
        done += len(group)
        progress.step(done)
    progress.finish()
    return result
