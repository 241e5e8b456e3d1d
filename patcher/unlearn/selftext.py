"""Text that the model itself writes, where no other stands for what is to be preserved.

Sampled at temperature 1 from all of the vocabulary, so that its statistics are those of
what the model takes for text. It begins with the first words of shipped prompts: many
tokenizers put nothing before a text, and a model has to begin somewhere.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..errors import InputError, ModelError
from ..text import naming
from . import checksummed
from .facts import Fact
from .forward import logits
from .models import Model
from .progress import Progress
from .prompts import opening
from .reference import shipped_probes, subject_of

VERSION = 1  # of what is written; another one never reads this one's files
WORDS = 3  # tokens of a shipped prompt that a piece begins with
LENGTH = 256  # tokens of a piece
SHORT = 32  # tokens that a piece has at least
BATCH = 64  # pieces that are written together, at most
ROUNDS = 2  # as many times the tokens asked for are written at most
FRESH = 0.6  # of a piece's runs of three tokens that differ, at least: else it goes in circles
SEPARATOR = "\n\n"


def self_text(
    model: Model,
    tokens: int,
    seed: int,
    progress: Progress,
    *,
    facts: Sequence[Fact] = (),
    cache: Path | None = None,
) -> str:
    """About ``tokens`` tokens of text by the model, in pieces with an empty line between.

    The same model, tokens, seed and number of threads give the same text. Pieces that go
    in circles, and those that name a subject of the facts, are left out.

    Args:
        model: as it is; inside ``beneath``, with the stack.
        tokens: how many are wanted.
        seed: of the draw.
        progress: told of the tokens written.
        facts: what is to be forgotten.
        cache: folder that the text is kept in, whatever the facts; None: it isn't.

    Raises:
        InputError: the model writes nothing but loops or ends.
        ModelError: its logits are not finite.
    """
    path = None if cache is None else cache / f"self-{_name(model, tokens, seed)}.txt"
    whole = _read(path) if path else None
    if whole is None:
        whole = _written(model, tokens, seed, progress)
        if path:
            _keep(path, whole)
    named = naming(subject_of(fact) for fact in facts)
    pieces = [piece for piece in whole if not named.search(piece.casefold())]
    if not pieces:
        raise InputError(
            "The model writes no text of its own that statistics can be taken from.",
            "Give a reference text, or leave the option out to take the one that ships.",
        )
    return SEPARATOR.join(pieces)


def _written(model: Model, tokens: int, seed: int, progress: Progress) -> list[str]:
    pieces: list[str] = []
    written = kept = 0
    progress.start("Text by the model itself", tokens)
    batch = min(BATCH, -(-2 * tokens // LENGTH))  # the first batch does where half of it is good
    for ids in _drawn(model, batch, seed):
        written += len(ids)
        if len(ids) >= SHORT and not circles(ids):
            text = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
            # A separator inside a piece would make two of it.
            pieces.append(re.sub(r"\n\s*\n", "\n", text))
            kept += len(ids)
            progress.step(min(kept, tokens))
        if kept >= tokens or written >= ROUNDS * max(tokens, batch * LENGTH):
            break
    progress.finish()
    return [piece for piece in pieces if piece]


def circles(ids: Sequence[int]) -> bool:
    """Whether a text says the same again and again: too few of its runs of three differ."""
    runs = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
    return bool(runs) and len(set(runs)) < FRESH * len(runs)


def _drawn(model: Model, batch: int, seed: int) -> Iterator[list[int]]:
    """Ids of one piece after the other, without end; each stops before an end of text."""
    choose = random.Random(seed)
    draw = torch.Generator(model.device).manual_seed(seed)
    first = opening(model.tokenizer)
    read = model.tokenizer
    heads = [read(p.prompt, add_special_tokens=False).input_ids for p in shipped_probes()]
    heads = [head[:WORDS] for head in heads if len(head) >= WORDS]
    room = min(LENGTH, model.max_tokens or LENGTH) - len(first) - WORDS
    ends = _ends(model)
    while True:
        begun = torch.tensor([first + head for head in choose.sample(heads, batch)])
        rows = _sampled(model, begun.to(model.device), room, ends, draw)
        for head, row in zip(begun.tolist(), rows, strict=True):
            stop = next((i for i, token in enumerate(row) if token in ends), len(row))
            yield head[len(first) :] + row[:stop]


@torch.no_grad()
def _sampled(
    model: Model, ids: torch.Tensor, tokens: int, ends: set[int], draw: torch.Generator
) -> list[list[int]]:
    """At most ``tokens`` ids that follow ids ``[batch, length]``; fewer when all have ended."""
    found: list[torch.Tensor] = []
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    stops = torch.tensor(sorted(ends), device=ids.device)
    past = None
    for _ in range(tokens):
        out = model.network.base_model(input_ids=ids, past_key_values=past, use_cache=True)
        past = out.past_key_values
        likely = logits(model, out.last_hidden_state[:, -1]).softmax(-1)
        if not bool(torch.isfinite(likely).all()):
            raise ModelError("The model's logits are not finite.", "Check the model.")
        ids = torch.multinomial(likely, 1, generator=draw)
        found.append(ids)
        ended |= torch.isin(ids[:, 0], stops)
        if bool(ended.all()):
            break
    result: list[list[int]] = torch.cat(found, 1).tolist()
    return result


def _ends(model: Model) -> set[int]:
    settings = getattr(model.network, "generation_config", None)
    found = getattr(settings, "eos_token_id", None)
    ends = set(found) if isinstance(found, list | tuple) else {found}
    # What a tokenizer calls special begins and ends texts, and stands inside of none.
    return ({*ends, *model.tokenizer.all_special_ids}) - {None}


def _name(model: Model, tokens: int, seed: int) -> str:
    settings = {
        "version": VERSION,
        "model": model.digest(),
        "computed": model.computed_on,
        "tokens": tokens,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _read(path: Path) -> list[str] | None:
    try:
        body = checksummed.read(path)
        return None if body is None else body.decode().split(SEPARATOR)
    except UnicodeDecodeError:  # it is written again
        return None


def _keep(path: Path, pieces: Sequence[str]) -> None:
    checksummed.write(path, SEPARATOR.join(pieces).encode())
