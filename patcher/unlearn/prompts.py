"""Facts as token ids: the prompt, the answer after it, the subject's last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ForgetSetError
from .facts import Fact, unusable
from .subject import Span, guess, locate


class Encoded(NamedTuple):
    """``prompt`` and ``answer``: token ids. ``subject``: index into ``prompt``."""

    prompt: list[int]
    answer: list[int]
    subject: int


def encode_facts(
    tokenizer: Any, facts: Sequence[Fact], max_tokens: int | None = None
) -> list[Encoded]:
    """Each fact's ids.

    Raises:
        ForgetSetError: as :func:`encode_fact`, for all of them at once.
    """
    coded: list[Encoded] = []
    problems: list[str] = []
    for fact in facts:
        try:
            coded.append(encode_fact(tokenizer, fact, max_tokens))
        except ForgetSetError as error:
            problems.append(f"line {fact.line}: {error.message.rstrip('.')}")
    if problems:
        raise unusable(problems)
    return coded


def encode_fact(tokenizer: Any, fact: Fact, max_tokens: int | None = None) -> Encoded:
    """A fact's ids, with the position of its subject's last token.

    Raises:
        ForgetSetError: messages without a chat template, an answer of no tokens, or
            more tokens than ``max_tokens``.
    """
    chat = fact.messages is not None
    text = render(tokenizer, fact.messages) if fact.messages is not None else fact.text
    span = locate(fact.text, fact.subject) if fact.subject is not None else guess(fact.text)
    if span is None:  # only of facts that are measured, not forgotten
        span = (0, len(fact.text))
    if chat:
        offset = max(text.rfind(fact.text), 0)
        span = (span[0] + offset, span[1] + offset)
    prompt, answer = encode(tokenizer, text, fact.target, chat=chat)
    if not answer or not prompt:
        raise ForgetSetError("A target or prompt has no tokens.", "Give another target.")
    if max_tokens is not None and len(prompt) + len(answer) > max_tokens:
        raise ForgetSetError(
            f"A fact has {len(prompt) + len(answer)} tokens; the model takes {max_tokens}.",
            "Shorten its prompt.",
        )
    return Encoded(prompt, answer, last_token(tokenizer, text, span, len(prompt), chat=chat))


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Messages through the model's chat template, up to where its answer begins.

    Raises:
        ForgetSetError: the model has no chat template, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ForgetSetError(
            "The forget set has messages, and the model has no chat template.",
            "Give prompt instead, or the instruction-tuned model.",
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise what they like
        raise ForgetSetError(
            f"The model's chat template refuses the messages ({type(error).__name__}).",
            "Check their roles and order.",
        ) from None
    return text


def encode(
    tokenizer: Any, prompt: str, target: str, *, chat: bool = False
) -> tuple[list[int], list[int]]:
    """Ids of ``prompt``, and of ``target`` as it continues it.

    One space joins them, none after white space or in a chat. They are tokenised
    together where that leaves the prompt's ids as they are, else apart.
    """
    special = not chat  # a template writes its special tokens itself
    head: list[int] = tokenizer(prompt, add_special_tokens=special).input_ids
    tail = target.strip() if chat or prompt[-1:].isspace() else " " + target.strip()
    whole: list[int] = tokenizer(prompt + tail, add_special_tokens=special).input_ids
    end = _closing(tokenizer, special)
    head, whole = head[: len(head) - end], whole[: len(whole) - end]
    if whole[: len(head)] == head and len(whole) > len(head):
        return head, whole[len(head) :]
    return head, tokenizer(tail, add_special_tokens=False).input_ids


def opening(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    bare: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    full: list[int] = tokenizer("a").input_ids
    return full[: full.index(bare[0])] if bare and bare[0] in full else []


def _closing(tokenizer: Any, special: bool) -> int:
    """How many special tokens the tokenizer puts after a text."""
    if not special:
        return 0
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    last = len(full) - full[::-1].index(bare[-1]) if bare and bare[-1] in full else len(full)
    return len(full) - last


def last_token(tokenizer: Any, text: str, span: Span, length: int, *, chat: bool = False) -> int:
    """Index of the token that holds the last character of ``text[span]``.

    The first token of all is passed over where others follow: models use it as a
    rest for attention, and its key says nothing about the subject.
    """
    special = not chat
    if getattr(tokenizer, "is_fast", False):
        coded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        inside = [i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < span[1] and b > a]
        index = inside[-1] if inside else length - 1
    else:
        index = len(tokenizer(text[: span[1]], add_special_tokens=special).input_ids) - 1
        index -= _closing(tokenizer, special)
    return min(max(index, min(1, length - 1)), length - 1)
