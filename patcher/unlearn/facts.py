"""The forget set: reading, checking and choosing its facts.

JSON Lines, UTF-8, one fact a line (docs/methods.md, "The forget set"). All that is
wrong is reported at once, by line and field; no message repeats a fact's text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ForgetSetError, UsageError
from ..text import encodable
from .subject import guess, locate

MAX_BYTES = 256 * 2**20
SHOWN = 20  # problems that a message spells out
_STRINGS = ("subject", "rephrase", "locality", "locality_target")
_ROLES = ("system", "user", "assistant", "tool")

Source = str | Path | Sequence[Mapping[str, Any]]
logger = logging.getLogger("patcher")


@dataclass(frozen=True)
class Fact:
    """One request: after ``prompt`` (or ``messages``) the model shall not say ``target``.

    Exactly one of ``prompt`` and ``messages`` is set. ``subject`` is None where the
    request names none: the position is then guessed (:mod:`patcher.unlearn.subject`).
    """

    target: str
    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    subject: str | None = None
    rephrase: str | None = None
    paraphrases: tuple[str, ...] = ()
    locality: str | None = None
    locality_target: str | None = None
    line: int = field(default=0, compare=False)  # where it stood, for messages

    @property
    def text(self) -> str:
        """The text that the subject stands in: the prompt, or the last message by the user."""
        if self.prompt is not None:
            return self.prompt
        assert self.messages is not None
        return _asked(self.messages)["content"]

    @property
    def other_wordings(self) -> tuple[str, ...]:
        """``rephrase`` and ``paraphrases``, each once."""
        first = (self.rephrase,) if self.rephrase is not None else ()
        return tuple(dict.fromkeys((*first, *self.paraphrases)))

    def canonical(self) -> dict[str, Any]:
        """The fields that are set, as plain JSON values: what a patch commits to."""
        fields: dict[str, Any] = {
            "target": self.target,
            "prompt": self.prompt,
            "messages": None if self.messages is None else [dict(m) for m in self.messages],
            "subject": self.subject,
            "rephrase": self.rephrase,
            "paraphrases": list(self.paraphrases) or None,
            "locality": self.locality,
            "locality_target": self.locality_target,
        }
        return {name: value for name, value in fields.items() if value is not None}


def read_facts(source: Source, limit: int | None = None, *, located: bool = True) -> list[Fact]:
    """The facts of a file or of a sequence of mappings, in their order.

    Args:
        source: path of a JSON Lines file, or the rows themselves.
        located: whether a subject has to stand in its prompt; what is only measured
            needs no subject at all.
        limit: take the first ``limit`` facts only; every line is checked nevertheless.

    Raises:
        ForgetSetError: the file can't be read, is empty, or some line is wrong: all
            wrong lines with their fields are in the message.
        UsageError: ``limit`` is not positive.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"The limit is {limit}.", "Give a number of facts from 1 on.")
    problems: list[str] = []
    facts: list[Fact] = []
    seen: dict[str, int] = {}
    for number, row in _rows(source, problems):
        fact = _fact(row, number, problems, located)
        if fact is None:
            continue
        key = json.dumps([fact.prompt, fact.canonical().get("messages"), fact.target])
        if key in seen:
            problems.append(f"line {number}: the same prompt and target as line {seen[key]}")
            continue
        seen[key] = number
        facts.append(fact)
    if problems:
        raise unusable(problems)
    if not facts:
        raise ForgetSetError("The forget set is empty.", "Give one JSON object a line.")
    return facts[:limit]


def unusable(problems: Sequence[str]) -> ForgetSetError:
    """The error that names all of those problems."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    shown = "; ".join(problems[:SHOWN])
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return ForgetSetError(
        f"The forget set has {count}: {shown}{more}.",
        "A line is a JSON object with prompt and target; see docs/methods.md.",
    )


def _rows(source: Source, problems: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not isinstance(source, str | Path):
        for number, row in enumerate(source, 1):
            if isinstance(row, Mapping):
                yield number, row
            else:
                problems.append(f"line {number}: not an object")
        return
    for number, line in enumerate(_lines(Path(source)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_no_duplicates, parse_constant=_refuse)
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error.msg}, column {error.colno})")
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {error or 'not JSON'}")
        else:
            if isinstance(row, dict):
                yield number, row
            else:
                problems.append(f"line {number}: not an object")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a field stands twice")
    return row


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _lines(path: Path) -> Iterable[str]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ForgetSetError(f"{path} is larger than {MAX_BYTES} bytes.", "Split it.")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ForgetSetError(
            f"The forget set {path} can't be read: {reason}.", "Give a JSON Lines file."
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise ForgetSetError(
            f"The forget set {path} is not UTF-8 (line {number}).", "Save it as UTF-8."
        ) from None
    return text.split("\n")


def _fact(row: Mapping[str, Any], number: int, problems: list[str], located: bool) -> Fact | None:
    found: list[str] = []
    target = _string(row, "target", found, required=True)
    prompt, messages = _question(row, found)
    optional = {name: _string(row, name, found) for name in _STRINGS}
    paraphrases = row.get("paraphrases")
    if paraphrases is None:
        paraphrases = []
    if not isinstance(paraphrases, list | tuple) or not all(_good(p) for p in paraphrases):
        found.append("paraphrases: not a list of texts")
        paraphrases = []
    if optional["locality_target"] is not None and optional["locality"] is None:
        found.append("locality_target: without locality")
    if not found:
        fact = Fact(
            target or "",
            prompt,
            messages,
            optional["subject"],
            optional["rephrase"],
            tuple(paraphrases),
            optional["locality"],
            optional["locality_target"],
            number,
        )
        if not located:
            return fact
        if fact.subject is not None and locate(fact.text, fact.subject) is None:
            # Real data does this: a country goes by another name in the prompt.
            logger.warning("line %d: subject does not stand in the prompt; guessed", number)
            fact = replace(fact, subject=None)
        if fact.subject is not None or guess(fact.text) is not None:
            return fact
        found.append("subject: missing, and the prompt has no word to take for it")
    problems.extend(f"line {number}: {problem}" for problem in found)
    return None


def _good(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and encodable(value)


def _string(
    row: Mapping[str, Any], name: str, found: list[str], required: bool = False
) -> str | None:
    value = row.get(name)
    if value is None:
        if required:
            found.append(f"{name}: missing")
        return None
    if not isinstance(value, str):
        found.append(f"{name}: not a text")
    elif not _good(value):
        found.append(f"{name}: empty" if not value.strip() else f"{name}: not valid Unicode")
    else:
        return value
    return None


def _question(
    row: Mapping[str, Any], found: list[str]
) -> tuple[str | None, tuple[Mapping[str, str], ...] | None]:
    messages = row.get("messages")
    if messages is None:
        return _string(row, "prompt", found, required=True), None
    if row.get("prompt") is not None:
        found.append("messages: given beside prompt; give one of the two")
        return None, None
    if not isinstance(messages, list | tuple) or not messages:
        found.append("messages: not a list of messages")
        return None, None
    for index, message in enumerate(messages, 1):
        if not (
            isinstance(message, Mapping)
            and message.get("role") in _ROLES
            and _good(message.get("content"))
        ):
            found.append(
                f"messages: number {index} needs a role of {', '.join(_ROLES)} and content"
            )
            return None, None
    plain = tuple({"role": m["role"], "content": m["content"]} for m in messages)
    if not any(message["role"] == "user" for message in plain):
        found.append("messages: none by the user")
        return None, None
    return None, plain


def _asked(messages: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    return next(message for message in reversed(messages) if message["role"] == "user")
