"""JSON with one form only: strict reading, and writing as RFC 8785 asks."""

from __future__ import annotations

import json
import math
import re
from itertools import islice
from typing import Any

import rfc8785

MAX_DEPTH = 32
MAX_DIGITS = 24
MAX_NUMBER = 32  # characters; the canonical form of a double has 25 at most
MAX_VALUES = 2**18  # a value takes up to 150 bytes of memory, whatever its text takes
MAX_INTEGER = 2**53 - 1  # what every JSON reader holds exactly (RFC 8785, section 3.2.2.3)

# A string that never ends counts to the end of the text: one pass, whatever comes.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def dumps(value: Any) -> bytes:
    """``value`` as canonical JSON, UTF-8.

    Raises:
        ValueError: something that JSON lacks, NaN or infinity, an integer beyond
            2^53 - 1, nesting beyond :data:`MAX_DEPTH`.
    """
    return rfc8785.dumps(plain(value))


def loads(text: bytes) -> Any:
    """The value of a JSON text that leaves nothing to a reader's taste.

    Raises:
        ValueError: not UTF-8, not JSON, a name given twice in one object, NaN or
            Infinity, nesting beyond :data:`MAX_DEPTH`, more than :data:`MAX_VALUES` values.
    """
    _check_extent(text)
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_number,
            parse_float=_float,
        )
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None


def plain(value: Any, depth: int = MAX_DEPTH) -> Any:
    """A copy of ``value`` made of JSON's own types: tuples become lists, subclasses their base.

    Raises:
        ValueError: as :func:`dumps`.
    """
    if depth < 0:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise ValueError("an integer beyond 2^53 - 1")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a number that is not finite")
        return float(value)
    if isinstance(value, list | tuple):
        return [plain(item, depth - 1) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a field name that is not text")
        return {_text(key): plain(item, depth - 1) for key, item in value.items()}
    raise ValueError(f"a value of type {type(value).__name__}, which JSON lacks")


def _text(value: str) -> str:
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError("text with half a surrogate pair")
    return str(value)


def _check_extent(text: bytes) -> None:
    """Before parsing: a parser recurses, and needs many times the text's memory for small values.

    Commas and opening brackets stand for values; strings are at most twice as many.
    """
    if sum(1 for _ in islice(_STRING.finditer(text), 2 * MAX_VALUES + 1)) > 2 * MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    bare = _STRING.sub(b"", text)
    if sum(map(bare.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    level = 0
    for bracket in _BRACKET.finditer(bare):
        level += 1 if bracket.group() in b"[{" else -1
        if level > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {ascii(name[:80])[:80]} stands twice in one object")
        result[name] = value
    return result


def _number(text: str) -> int | float:
    """Canonical JSON writes a float of 2^53 or more without a point or exponent, up to 1e21."""
    if len(text) > MAX_DIGITS:
        raise ValueError("a number of too many digits")
    value = int(text)
    return value if abs(value) <= MAX_INTEGER else float(value)


def _float(text: str) -> float:
    if len(text) > MAX_NUMBER:
        raise ValueError("a number of too many digits")
    return float(text)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
