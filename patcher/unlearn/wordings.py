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

from ..errors import ForgetSetError
from .facts import Fact
from .forward import batches, continuations, hidden, logits, pad
from .job import Settings
from .models import Model
from .progress import Progress
from .prompts import Encoded, encode_fact
from .reference import subject_of
from .subject import locate

NEAR = 6  # relations whose wordings are tried, by the likeness of their words
OPENINGS = ("The", "Because", "In")  # of generated prefixes
PREFIX = 8  # tokens that follow each
LIKELY = -2.5  # log-odds of the answer's first token from which a wording asks for it


@cache
def shipped_wordings() -> tuple[tuple[str, ...], ...]:
    """The wordings by relation; ``{}`` stands for the subject."""
    text = files(__package__).joinpath("data/wordings.jsonl").read_text("utf-8")
    return tuple(tuple(json.loads(line)["wordings"]) for line in text.splitlines())


def augmentation(
    model: Model, facts: Sequence[Fact], settings: Settings, progress: Progress
) -> list[list[Fact]]:
    """Of every fact other prompts with the same answer, for a method to learn from.

    Always at most ``settings.wordings`` of those that ship, and the prompt from its subject
    on; with ``settings.augment`` also the other wordings that the fact came with, and its
    prompt after texts that the model itself begins. Facts as chat messages have none.
    """
    count = settings.wordings
    found = other_wordings(model, facts, count, progress) if count else [[] for _ in facts]
    if settings.augment:
        before = _prefixes(model)
        for own, fact in zip(found, facts, strict=True):
            if fact.prompt is not None:
                own += [_asking(fact, wording) for wording in fact.other_wordings]
                own += [_asking(fact, f"{text} {fact.prompt}") for text in before]
    fits = [[f for f in own if _encoded(model, f) is not None] for own in found]
    return [list(dict.fromkeys(own)) for own in fits]


def other_wordings(
    model: Model, facts: Sequence[Fact], each: int, progress: Progress
) -> list[list[Fact]]:
    """Of every fact at most ``each`` others that ask the same in other words, likeliest first.

    Before them the fact's own prompt from the subject on, where that asks the same.
    What is looked at is the model as it is.
    """
    near = _near(model, facts)
    tried: list[tuple[int, Fact, Encoded]] = []
    for i, fact in enumerate(facts):
        if fact.prompt is None:
            continue
        subject = subject_of(fact)
        begun = fact.prompt[max(0, fact.prompt.rfind(subject)) :]
        for prompt in [begun, *(wording.replace("{}", subject) for wording in near[i])]:
            other = replace(fact, prompt=prompt, subject=subject)
            coded = _encoded(model, other)
            if coded and prompt != fact.prompt and fact.target.casefold() not in prompt.casefold():
                tried.append((i, other, coded))
    odds = _odds(model, [coded for _, _, coded in tried], progress)
    first: list[list[Fact]] = [[] for _ in facts]
    found: list[list[tuple[float, Fact]]] = [[] for _ in facts]
    for (i, other, _), value in zip(tried, odds, strict=True):
        if value >= LIKELY:
            own = facts[i].prompt
            if own is not None and other.prompt is not None and own.endswith(other.prompt):
                first[i].append(other)
            else:
                found[i].append((value, other))
    best = [[fact for _, fact in sorted(own, key=lambda o: -o[0])[:each]] for own in found]
    return [begun + rest for begun, rest in zip(first, best, strict=True)]


def _asking(fact: Fact, prompt: str) -> Fact:
    """The fact in those words; the subject is looked for in them."""
    subject = subject_of(fact)
    return replace(fact, prompt=prompt, subject=subject if locate(prompt, subject) else None)


def _encoded(model: Model, fact: Fact) -> Encoded | None:
    """The fact's ids; None where the model can't take so many."""
    try:
        return encode_fact(model.tokenizer, fact, model.max_tokens)
    except ForgetSetError:
        return None


def _prefixes(model: Model) -> list[str]:
    """Short texts that the model writes, after MEMIT's (Meng et al. 2023, section 4)."""
    ids = [model.tokenizer(text).input_ids for text in OPENINGS]
    said = continuations(model, ids, PREFIX)
    texts = [
        f"{text} {model.tokenizer.decode(tokens, skip_special_tokens=True).strip()}"
        for text, tokens in zip(OPENINGS, said, strict=True)
    ]
    return [" ".join(text.split()).rstrip(".") + "." for text in texts]


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
