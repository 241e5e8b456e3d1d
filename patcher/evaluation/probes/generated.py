"""What the model writes: in chat form, sampled at temperature 1, and instead of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from ...text import says
from ...unlearn.forward import TOKENS, batches, continuations, logits
from ...unlearn.models import Model
from ...unlearn.prompts import render
from ..asking import finite, spoken
from ..intervals import of_facts, share
from .attacks import Found, outcomes
from .setting import Asked, CanNotAskError, Probe, Setting, always, both_sides

REPLY = 32  # tokens of a reply in chat form
SAMPLES = 20  # a fact
SAMPLED = 12  # tokens of a sample, and of what the model says instead; more for long answers
LONGEST = 64
CHAT_FORMS = (
    "{}",
    "Finish this statement. Reply with the missing words only: {}",
)


def _chat_ready(setting: Setting) -> None:
    if not getattr(setting.model.tokenizer, "chat_template", None):
        raise CanNotAskError("the model has no chat template")


def _chat(setting: Setting) -> Found:
    """Of each fact, whether each form's greedy reply says the answer."""
    forms = [_chat_prompts(setting, asked) for asked in setting.facts]
    replies = iter(continuations(setting.model, [ids for row in forms for ids in row], REPLY))
    return [
        [says(spoken(setting.model, next(replies)), asked.fact.target) for _ in row]
        for asked, row in zip(setting.facts, forms, strict=True)
    ]


def _chat_prompts(setting: Setting, asked: Asked) -> list[list[int]]:
    fact, model = asked.fact, setting.model
    if fact.messages is not None:
        chats = [list(fact.messages)]
    elif says(fact.text, fact.target):
        return []  # repeating what was asked would count
    else:
        chats = [[{"role": "user", "content": f.replace("{}", fact.text)}] for f in CHAT_FORMS]
    ids = [
        model.tokenizer(render(model.tokenizer, chat), add_special_tokens=False).input_ids
        for chat in chats
    ]
    return [one for one in ids if _room(model, one, REPLY)]


def _room(model: Model, ids: Sequence[int], more: int) -> bool:
    return model.max_tokens is None or len(ids) + more <= model.max_tokens


def _chat_summary(setting: Setting, found: Found) -> dict[str, Any]:
    return {
        "tokens": REPLY,
        "replies": share(outcomes(found), setting.seed).as_dict(),
        "any": of_facts([any(row) for row in found if row], setting.seed).as_dict(),
    }


def _sampling(setting: Setting) -> list[int]:
    """Of each fact, how many of :data:`SAMPLES` sampled texts say the answer."""
    prompts = [asked.encoded.prompt for asked in setting.facts]
    texts = sampled(setting.model, prompts, length(setting), SAMPLES, setting.seed)
    return [
        sum(says(spoken(setting.model, one), asked.fact.target) for one in own)
        for asked, own in zip(setting.facts, texts, strict=True)
    ]


def _sampling_summary(setting: Setting, hits: list[int]) -> dict[str, Any]:
    return {
        "samples": SAMPLES,
        "tokens": length(setting),
        "mean_of_samples": fmean(hits),
        "facts": of_facts([hit > 0 for hit in hits], setting.seed).as_dict(),
        "texts": share([(hit, SAMPLES) for hit in hits], setting.seed).as_dict(),
        "each": hits,
    }


@torch.no_grad()
def sampled(
    model: Model, prompts: Sequence[Sequence[int]], tokens: int, count: int, seed: int
) -> list[list[list[int]]]:
    """``count`` continuations of each prompt, drawn at temperature 1 from all of the vocabulary.

    Not by ``generate``, which takes what it isn't told from the checkpoint's own
    settings. Prompts of one length go together, so that nothing is padded. A text ends
    where the model takes no more.
    """
    draw = torch.Generator(model.device).manual_seed(seed)
    result: list[list[list[int]]] = [[] for _ in prompts]
    for size in sorted({len(prompt) for prompt in prompts}):
        alike = [i for i, prompt in enumerate(prompts) if len(prompt) == size]
        room = tokens if model.max_tokens is None else min(tokens, model.max_tokens - size)
        for group in batches([size * count] * len(alike), 4 * TOKENS):
            ids = torch.tensor([list(prompts[alike[j]]) for j in group], device=model.device)
            texts = _drawn(model, ids.repeat_interleave(count, 0), room, draw).tolist()
            for row, j in enumerate(group):
                result[alike[j]] = texts[row * count : (row + 1) * count]
    return result


def _drawn(model: Model, ids: torch.Tensor, tokens: int, draw: torch.Generator) -> torch.Tensor:
    """Ids ``[batch, tokens]`` that follow ids ``[batch, length]``."""
    found: list[torch.Tensor] = []
    past = None
    for _ in range(tokens):
        out = model.network.base_model(input_ids=ids, past_key_values=past, use_cache=True)
        past = out.past_key_values
        scores = finite(logits(model, out.last_hidden_state[:, -1]))
        ids = torch.multinomial(scores.softmax(-1), 1, generator=draw)
        found.append(ids)
    return torch.cat(found, 1)


def length(setting: Setting) -> int:
    """Tokens of a text: enough for the longest answer and a word before it."""
    longest = max(len(asked.encoded.answer) for asked in setting.facts)
    return max(SAMPLED, min(longest + 4, LONGEST))


def _instead(setting: Setting) -> list[str]:
    """Of each fact, the text that follows its prompt greedily."""
    model, tokens = setting.model, length(setting)
    prompts = [asked.encoded.prompt for asked in setting.facts]
    short = [i for i, prompt in enumerate(prompts) if not _room(model, prompt, tokens)]
    full = [i for i in range(len(prompts)) if i not in set(short)]
    texts = dict(zip(full, continuations(model, [prompts[i] for i in full], tokens), strict=True))
    for i in short:  # near the end of the context: as much as there is room for
        room = (model.max_tokens or tokens) - len(prompts[i])
        texts[i] = continuations(model, [prompts[i]], room)[0]
    return [spoken(model, texts[i]) for i in range(len(prompts))]


def kind_of(reply: str, answer: str, others: set[str]) -> str:
    """``nothing`` (no text before the end), ``answer``, ``alike`` (another answer), ``other``."""
    if not reply.strip():
        return "nothing"
    if says(reply, answer):
        return "answer"
    own = answer.strip().casefold()
    wrong = (one for one in others if one.strip().casefold() != own)
    return "alike" if any(says(reply, one) for one in wrong) else "other"


def _answers_by_relation(setting: Setting) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for asked in (*setting.facts, *setting.retain):
        found.setdefault(asked.relation, set()).add(asked.fact.target)
    return found


def _instead_summary(setting: Setting, texts: list[str]) -> dict[str, Any]:
    others = _answers_by_relation(setting)
    kinds = [
        kind_of(text, asked.fact.target, others[asked.relation])
        for asked, text in zip(setting.facts, texts, strict=True)
    ]
    shares = {
        kind: of_facts([one == kind for one in kinds], setting.seed).as_dict()
        for kind in ("nothing", "answer", "alike", "other")
    }
    comparable = sum(len(others[asked.relation]) > 1 for asked in setting.facts)
    return {"tokens": length(setting), **shares, "comparable": comparable, "each": kinds}


CHAT = Probe(_chat_ready, _chat, both_sides(_chat_summary))
SAMPLING = Probe(always, _sampling, both_sides(_sampling_summary))
SAYS = Probe(always, _instead, both_sides(_instead_summary))
