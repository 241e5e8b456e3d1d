"""What an edit must leave alone: running text, and prompts about other subjects.

Both ship in ``data/`` (``data/NOTICE.md`` names sources and licences). Running text
stands for everything a model reads; the prompts for what lies nearest to a fact: a
subject's last token, where the model recalls what it knows of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..text import naming
from .facts import Fact
from .models import Model
from .prompts import last_token, opening
from .subject import guess, locate

MAX_BYTES = 64 * 2**20


class Probe(NamedTuple):
    """A prompt about a subject that nobody asked to forget."""

    prompt: str
    subject: str


class Located(NamedTuple):
    """Ids of prompts, and the position of each one's subject's last token."""

    sequences: list[list[int]]
    positions: list[int]


def reference_text(path: str | Path | None) -> str:
    """The text of that file, or of the one that ships.

    Raises:
        InputError: it can't be read, is not UTF-8, or is empty.
    """
    if path is None:
        return files(__package__).joinpath("data/reference.txt").read_text("utf-8")
    return read_text(path)


def read_text(path: str | Path) -> str:
    """A text file.

    Raises:
        InputError: it can't be read, is too large, not UTF-8, or empty.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise InputError(f"{file} is larger than {MAX_BYTES} bytes.", "Give an excerpt.")
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8.", "Save it as UTF-8.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{file} can't be read: {reason}.", "Give a text file.") from None
    if not text.strip():
        raise InputError(f"{file} is empty.", "Give a text of some thousand words.")
    return text


def shipped_probes() -> list[Probe]:
    """The prompts that ship, in their order."""
    text = files(__package__).joinpath("data/probes.jsonl").read_text("utf-8")
    return [Probe(**json.loads(line)) for line in text.splitlines()]


def same_wording(
    facts: Sequence[Fact], probes: Sequence[Probe], each: int, seed: int
) -> list[Probe]:
    """Every fact's prompt with ``each`` other subjects in place of its own.

    Facts as chat messages are left out: what surrounds their subject is the template's.
    Subjects of the forget set itself are never put in.
    """
    draw = random.Random(seed)
    own = {subject_of(fact).casefold() for fact in facts}
    others = sorted({probe.subject for probe in probes if probe.subject.casefold() not in own})
    result: list[Probe] = []
    for fact in facts:
        if fact.prompt is None:
            continue
        subject = subject_of(fact)
        for other in draw.sample(others, min(each, len(others))):
            result.append(Probe(fact.prompt.replace(subject, other), other))
    return result


def without(facts: Sequence[Fact], probes: Sequence[Probe]) -> list[Probe]:
    """The probes whose prompts name no subject of the forget set."""
    named = naming(subject_of(fact) for fact in facts)
    return [probe for probe in probes if not named.search(probe.prompt.casefold())]


def locate_probes(model: Model, probes: Sequence[Probe]) -> Located:
    """Ids and subject positions of probes."""
    sequences: list[list[int]] = []
    positions: list[int] = []
    for probe in probes:
        ids: list[int] = model.tokenizer(probe.prompt).input_ids
        span = locate(probe.prompt, probe.subject) or (0, len(probe.prompt))
        sequences.append(ids)
        positions.append(last_token(model.tokenizer, probe.prompt, span, len(ids)))
    return Located(sequences, positions)


def windows(tokenizer: Any, text: str, length: int, limit: int) -> list[list[int]]:
    """The first ``limit`` tokens of a text in pieces of ``length``; a rest of one is left out.

    Each piece begins with the special tokens that the tokenizer puts before a text:
    some models make no sense of one without.
    """
    # Twelve characters a token is more than any text has: the rest is tokenised in vain.
    ids: list[int] = tokenizer(
        text[: limit * 12], add_special_tokens=False, verbose=False
    ).input_ids
    ids = ids[:limit]
    first = opening(tokenizer)
    step = max(1, length - len(first))
    pieces = [ids[start : start + step] for start in range(0, len(ids), step)]
    return [first + piece for piece in pieces if len(piece) > 1]


def subject_of(fact: Fact) -> str:
    """The fact's subject, or the guessed one."""
    if fact.subject is not None:
        return fact.subject
    span = guess(fact.text)
    assert span is not None  # read_facts has seen to it
    return fact.text[slice(*span)]
