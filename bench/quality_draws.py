"""Which facts ``quality.py`` forgets and which it asks for; no model in here.

Facts are drawn half from CounterFact and half from ``world.jsonl``. The subjects are
split in two by their SHA-256: what was tuned was tuned on the ``tuning`` half alone.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher.unlearn.reference import shipped_probes
from patcher.unlearn.wordings import shipped_wordings

Row = dict[str, Any]
PARTS = ("tuning", "unseen", "all")
COUNTERFACT, WORLD = 50, 100  # others that are asked for, at most
SAME = 2  # facts with the same answer that are asked for, a forgotten one


@dataclass(frozen=True)
class Data:
    """The rows of both sources, groups of wordings, the text for perplexity."""

    counterfact: list[Row]
    world: list[Row]
    wordings: list[list[str]]
    text: str
    digest: str


@dataclass(frozen=True)
class Draw:
    """Facts to be forgotten, and others that must stay.

    ``counterfact``, ``world``: by source, none of them about a subject of the prompts that
    ship, as every patch is computed to leave those alone. ``same``: of each forgotten fact,
    facts with the same answer.
    """

    forget: list[Row]
    counterfact: list[Row]
    world: list[Row]
    same: list[list[Row]]


def read(folder: Path) -> Data:
    """The project's data, or the tests' (fewer facts) where ``facts.jsonl`` is in the folder."""
    names = ("counterfact.jsonl", "world.jsonl", "templates.json", "wikitext_ppl.txt")
    if (folder / "facts.jsonl").exists():
        names = ("facts.jsonl", "facts.jsonl", "templates.json", "ppl.txt")
    first, second, groups, text = ((folder / name).read_text("utf-8") for name in names)
    counterfact, world = ([json.loads(line) for line in t.splitlines()] for t in (first, second))
    return Data(
        [row for row in counterfact if "relation" not in row],
        [row for row in world if "relation" in row],
        json.loads(groups),
        text,
        hashlib.sha256("".join((first, second, groups, text)).encode()).hexdigest()[:12],
    )


def in_part(row: Row, part: str) -> bool:
    half = hashlib.sha256(row["subject"].encode()).digest()[0] % 2
    return part == "all" or half == PARTS.index(part)


def fit(rows: Sequence[Row], part: str) -> list[Row]:
    """Rows of that part: one a subject, which the prompt names; the answer not in the prompt."""
    seen: set[str] = set()
    result = []
    for row in rows:
        # Two of the world's name theirs otherwise: "Czechia".
        if not in_part(row, part) or row["subject"] not in row["prompt"]:
            continue
        if row["subject"] not in seen and row["target"].lower() not in row["prompt"].lower():
            seen.add(row["subject"])
            result.append(row)
    return result


def draw(
    counterfact: Sequence[Row],
    world: Sequence[Row],
    facts: int,
    seed: int,
    shipped: Collection[str],
) -> Draw:
    """``facts`` of the known rows, half of each source as far as they reach, and others.

    At most half of CounterFact's are forgotten: the others are needed to see the damage.
    ``shipped``: subjects of the prompts that ship, from :func:`shipped_subjects`.
    """
    order = random.Random(seed)
    first = order.sample(counterfact, len(counterfact))
    second = order.sample(world, len(world))
    n = min(facts // 2, len(first) // 2)
    forget = first[:n] + second[: facts - n]
    own = {row["subject"] for row in forget}
    fresh = [
        [r for r in rows if r["subject"] not in own and r["subject"].casefold() not in shipped]
        for rows in (first[n:], second)
    ]
    return Draw(
        forget,
        fresh[0][:COUNTERFACT],
        fresh[1][:WORLD],
        [same_answer(row, fresh[0] + fresh[1])[:SAME] for row in forget],
    )


def same_answer(row: Row, others: Sequence[Row]) -> list[Row]:
    """Others that ask for the same relation (CounterFact's: in the same words) and answer."""
    return [
        other
        for other in others
        if other["target"] == row["target"]
        and other.get("relation") == row.get("relation")
        and ("relation" in row or template(other) == template(row))
    ]


def split(draw_: Draw, patches: int, seed: int) -> list[list[Row]]:
    """The facts in so many lots, each of both sources."""
    rows = random.Random(seed).sample(draw_.forget, len(draw_.forget))
    return [rows[i::patches] for i in range(patches)]


def template(row: Row) -> str:
    return normal(row["prompt"], row["subject"])


def normal(text: str, subject: str = "{}") -> str:
    """A wording without its subject, case, punctuation and spaces, to be compared."""
    words = text.replace(subject, " {} ").casefold()
    return " ".join(re.sub(r"[^\w{}]+", " ", words).split())


def shipped_subjects() -> frozenset[str]:
    """Whom the prompts that ship are about: a patch's statistics and guards see them.

    They come from the same public sets as the facts here: some rows are among them.
    """
    return frozenset(probe.subject.casefold() for probe in shipped_probes())


def shipped_prompts() -> frozenset[str]:
    return frozenset(normal(probe.prompt) for probe in shipped_probes())


def used_in_computing() -> frozenset[str]:
    """The wordings that ship with patcher: what is computed may learn from them."""
    return frozenset(normal(wording) for group in shipped_wordings() for wording in group)


def other_wordings(row: Row, groups: Sequence[Sequence[str]], used: Collection[str]) -> list[str]:
    """Prompts that ask the same in words that were never used in computing.

    The row's own and those of its template's group. Left out is what ends as the prompt
    or as one of ``used`` does (some of CounterFact's are a known wording behind an
    unrelated sentence), and what names the answer.
    """
    subject, own = row["subject"], template(row)
    candidates = [row["rephrase"]] if row.get("rephrase") else []
    candidates += row.get("paraphrases", [])
    for group in groups:
        if own in map(normal, group):
            candidates += [wording.replace("{}", subject) for wording in group]
    found: dict[str, str] = {}
    for text in candidates:
        words = normal(text, subject)
        if not words.endswith((own, *used)) and row["target"].casefold() not in text.casefold():
            found.setdefault(words, text)
    return list(found.values())
