"""Text: the one reading of where an answer stands in it, and a stranger's in a message."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Scripts that set no space between words, and Hangul, whose particles cling to a word: Thai, Lao,
# Tibetan, Myanmar, Khmer, Hangul, kana, bopomofo, Han (Unicode's blocks, halfwidth forms among
# them).
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3035"
    "\u3038-\u303b\u3040-\u318f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f"
    "\ua9e0-\ua9ff\uaa60-\uaa7f\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
NAME = r"[\w.@+-]{1,64}"  # of somebody who signs, or holds a token
_CLINGS = re.compile(f"[{_UNSPACED}]")
_LETTER = rf"[^\W{_UNSPACED}]"  # of a word that spaces set apart


def says(text: str, target: str) -> bool:
    """Whether ``target`` stands in ``text`` as words of its own, whatever the case.

    Where a script sets no spaces between words, anywhere in the text counts.

    >>> says("It is in PARIS, France.", "Paris"), says("a comparison", "Paris")
    (True, False)
    >>> says("\u5df4\u9ece\u662f\u6cd5\u56fd\u7684\u9996\u90fd\u3002", "\u5df4\u9ece")
    True
    """
    found: re.Match[str] | None = naming([target]).search(text.casefold())
    return found is not None


def naming(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern of any of the words, each standing by itself, to be sought in casefolded text.

    Of no words: one that is nowhere.
    """
    alike: dict[tuple[str, str], list[str]] = {}  # a thousand with edges of their own took seconds
    for word in words:
        plain = word.strip().casefold()
        before = "" if _CLINGS.match(plain[:1]) else rf"(?<!{_LETTER})"
        after = "" if _CLINGS.match(plain[-1:]) else rf"(?!{_LETTER})"
        alike.setdefault((before, after), []).append(re.escape(plain))
    any_of = [f"{before}(?:{'|'.join(some)}){after}" for (before, after), some in alike.items()]
    return re.compile("|".join(any_of) or r"(?!)")


def encodable(text: str) -> bool:
    """Whether UTF-8 has it: it holds no half of a surrogate pair, as JSON's escapes may."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(text: str, most: int = 16) -> str:
    """The beginning of what somebody sent, fit for a message and a line of a log.

    >>> shown("4b0c\\nforged line of a log")
    '4b0c\\\\nforged line'
    """
    return ascii(text[:most])[1:-1][: 2 * most]
