"""From what the caller gave to a method's job, and to what the check will ask."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import InputError
from .check import Check, wordings_of
from .choosing import Chosen
from .facts import Fact
from .job import Job, Settings
from .models import Model
from .progress import Progress
from .prompts import encode_facts
from .reference import Probe, shipped_probes, windows, without
from .statistics import cache_folder
from .wordings import augmentation

HELD_OUT = 128  # probes that the statistics don't see: the check asks them
CHECKED_TOKENS = 1024  # of the reference text, after those that the statistics are taken from
logger = logging.getLogger("patcher")


def prepare(
    model: Model,
    chosen: Chosen,
    settings: Settings,
    text: str,
    kept: Sequence[Fact],
    cache: str | Path | None,
    progress: Progress,
) -> tuple[Job, Check]:
    """The job, and apart from it what the check will ask.

    Raises:
        InputError: the reference text has no two tokens.
        ForgetSetError: a fact that is to stay, a wording or a neighbour is too long.
    """
    window = min(settings.window, model.max_tokens or settings.window)
    pieces = windows(model.tokenizer, text, window, settings.text_tokens + CHECKED_TOKENS)
    if not pieces:
        raise InputError("The reference text has no two tokens.", "Give some thousand words.")
    aside = min(CHECKED_TOKENS // window, len(pieces) // 8)
    read, unread = (pieces[:-aside], pieces[-aside:]) if aside else (pieces, [])
    _tell_short(model, settings, sum(map(len, read)))
    probes = without(chosen.facts, shipped_probes())
    step = max(1, len(probes) // HELD_OUT)
    asked = probes[::step][:HELD_OUT]
    probes = [probe for i, probe in enumerate(probes) if i % step or i // step >= HELD_OUT]
    forgotten = {tuple(one.prompt) for one in chosen.encoded}
    owners = encode_facts(model.tokenizer, kept, model.max_tokens)
    probes += [Probe(f.prompt, f.subject or f.prompt) for f in kept if f.prompt is not None]
    settings = replace(settings, window=window)
    place = cache_folder(cache)
    others = augmentation(model, chosen.facts, settings, progress)
    job = Job(
        model,
        chosen.facts,
        chosen.encoded,
        settings,
        read,
        probes,
        place,
        progress,
        augmented=[encode_facts(model.tokenizer, own) for own in others],
        reworded=[fact for own in others for fact in own],
        retained=[one for one in owners if tuple(one.prompt) not in forgotten],
    )
    wordings, near = wordings_of(model.tokenizer, chosen.facts, model.max_tokens)
    return job, Check(unread, asked, owners, wordings, near)


def _tell_short(model: Model, settings: Settings, tokens: int) -> None:
    """Say so where a reference text can't show every direction of an output."""
    directions = len(model.weight(model.module_name(settings.layers[0])))
    if tokens < directions:
        logger.warning(
            "the reference text has %d tokens, fewer than an output has directions (%d): "
            "what it stands for is hardly protected",
            tokens, directions,
        )  # fmt: skip
