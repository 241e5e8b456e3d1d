"""Where a fact's subject stands in its prompt, and how it is guessed where nobody says.

The guess (docs/methods.md, "The subject"): the longest run of capitalised words,
"of", "the" and their like between two of them included; a capital at the start of
the prompt or of a sentence counts only for words that aren't common ones. Where
there is none, the last word that is not a common one; where there is none of those
either, the last word.
"""

from __future__ import annotations

import re

# Words that carry no subject: articles, prepositions, auxiliaries, question words and the like.
_COMMON = """a an the of in on at to for from by with as is was are were be been being am it its
    this that these those he she they we you i his her their our your my who whom whose which what
    when where why how do does did done has have had and or but not no if then than into about
    over under between during after before up down out off can could will would shall should may
    might must there here also only one name tell list give find according please answer
    question true following official located called known named born used"""
COMMON = frozenset(_COMMON.split())
_JOINER_WORDS = "of the de da di do du del della der den des la le el al and y e van von for in"
_JOINERS = frozenset(_JOINER_WORDS.split())
_WORD = re.compile(r"[^\W_]+(?:[-'’.&][^\W_]+)*\.?", re.UNICODE)
_SENTENCE_END = re.compile(r"[.!?:]\s*[\"'“]?\s*$")

Span = tuple[int, int]


def locate(prompt: str, subject: str) -> Span | None:
    """The characters ``start:stop`` of the last time that ``subject`` stands in ``prompt``."""
    start = prompt.rfind(subject)
    return None if start < 0 else (start, start + len(subject))


def guess(prompt: str) -> Span | None:
    """The span of the likely subject by the module's rule; None where there is no word."""
    words = [(match.start(), match.end()) for match in _WORD.finditer(prompt)]
    if not words:
        return None
    words = [_trimmed(prompt, a, b) for a, b in words]
    runs = _capitalised_runs(prompt, words)
    if runs:
        return max(runs, key=lambda run: (run[1] - run[0], run[0]))
    content = [(a, b) for a, b in words if prompt[a:b].lower() not in COMMON]
    return (content or words)[-1]


def _trimmed(prompt: str, a: int, b: int) -> Span:
    """Without a full stop or a possessive at the end."""
    word = prompt[a:b].removesuffix(".")
    for ending in ("'s", "’s"):
        word = word.removesuffix(ending)
    return a, a + len(word)


def _capitalised_runs(prompt: str, words: list[Span]) -> list[Span]:
    runs: list[Span] = []
    current: Span | None = None
    end = 0  # where the word before ended
    for index, (a, b) in enumerate(words):
        gap = prompt[end:a]
        if current and gap.strip(" "):  # a comma, a full stop, a bracket ends a run
            runs.append(current)
            current = None
        if _is_name(prompt, a, b):
            current = (current[0] if current else a, b)
        elif current and not (prompt[a:b] in _JOINERS and _continues(prompt, words, index)):
            runs.append(current)
            current = None
        end = b
        if current and b < len(prompt) and prompt[b] != " ":  # a possessive ends it too
            runs.append(current)
            current = None
    if current:
        runs.append(current)
    return runs


def _is_name(prompt: str, a: int, b: int) -> bool:
    word = prompt[a:b]
    if not (word[0].isupper() or word[0].isdigit()):
        return False
    if word[0].isdigit():
        return True
    starts = a == 0 or _SENTENCE_END.search(prompt[:a]) is not None
    return not (starts and word.lower() in COMMON) and word.lower() not in ("i", "q", "a")


def _continues(prompt: str, words: list[Span], index: int) -> bool:
    """Whether one more word, next to this joiner (or to a second one), is a name."""
    for a, b in words[index + 1 : index + 3]:
        if prompt[words[index][1] : a].strip(" ") and prompt[a:b] not in _JOINERS:
            return False
        if _is_name(prompt, a, b):
            return True
        if prompt[a:b] not in _JOINERS:
            return False
    return False
