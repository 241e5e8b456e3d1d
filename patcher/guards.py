"""Guards: what must hold on the live engine before a change counts (docs/protocol.md, "Guards").

A guard is one JSON object: a ``prompt`` (or ``messages``, or a ``text``) and bounds on what the
engine makes of it. Client and engine share this model; ``patcher/engine/guards.py`` runs them.
No message of an error repeats what a guard holds: it may be what is to be forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from patcher.errors import InputError
from patcher.patch import canonical

MAX_GUARDS = 256
MAX_BYTES = 1 << 19  # of all guards: they travel with the change, whose body is bounded
MAX_TOKENS = 512
SHOWN = 20  # problems that a message spells out

GuardSource: TypeAlias = "str | PathLike[str] | Mapping[str, Any]"

SAID = ("must_contain", "must_start_with", "must_not_contain")  # of the greedy answer
LIKELY = ("max_probability", "min_probability")  # of the target
LOSS = ("max_loss", "max_ratio")  # of the text


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("has characters that do not print")
    return value


def _said(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, from an escape
        raise ValueError("is not valid Unicode") from None
    return value


Said = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_said)]
Read = Annotated[str, Field(min_length=1, max_length=MAX_BYTES), AfterValidator(_said)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: Read


class Guard(BaseModel):
    """Exactly one of ``prompt``, ``messages`` and ``text``, and one bound or more on it.

    ``name`` stands in results and in the ledger: nothing secret. Of a prompt or messages:
    ``must_contain``, ``must_start_with``, ``must_not_contain`` (in ``tokens`` greedy tokens),
    ``max_probability`` and ``min_probability`` (of ``target`` as the answer). Of a text:
    ``max_loss`` (mean nats a token), ``max_ratio`` (perplexity after the change over before).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    name: Annotated[str, Field(max_length=128), AfterValidator(_printable)] = ""
    prompt: Read | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)] | None = None
    text: Read | None = None
    tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 24
    must_contain: Said | None = None
    must_start_with: Said | None = None
    must_not_contain: Said | None = None
    target: Said | None = None
    max_probability: Probability | None = None
    min_probability: Probability | None = None
    max_loss: Positive | None = None
    max_ratio: Positive | None = None

    @property
    def bounds(self) -> tuple[str, ...]:
        """The names of the bounds that this guard sets."""
        return tuple(n for n in (*SAID, *LIKELY, *LOSS) if getattr(self, n) is not None)

    @model_validator(mode="after")
    def _fits(self) -> Guard:
        given = [n for n in ("prompt", "messages", "text") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError("needs exactly one of prompt, messages and text")
        allowed = LOSS if self.text is not None else (*SAID, *LIKELY)
        foreign = [name for name in self.bounds if name not in allowed]
        if foreign:
            raise ValueError(f"{foreign[0]} does not go with {given[0]}")
        if not self.bounds:
            raise ValueError(f"sets no bound; one of {', '.join(allowed)}")
        if (self.target is None) != (not any(name in LIKELY for name in self.bounds)):
            raise ValueError("target goes with max_probability or min_probability")
        return self


def read_guards(sources: GuardSource | Sequence[GuardSource]) -> list[dict[str, Any]]:
    """The guards of JSON Lines files and of mappings, in their order, as they go on the wire.

    One file or mapping may be given as it is.
    A guard without a name is called by its file and line, or by its place.

    Raises :class:`~patcher.errors.InputError`: a file can't be read, a line is no guard (every
    wrong line is in the message), there is none at all, or there are too many.
    """
    if isinstance(sources, str | PathLike | Mapping):
        sources = [sources]
    problems: list[str] = []
    guards: list[Guard] = []
    for place, row in _rows(sources, problems):
        try:
            guard = Guard.model_validate_json(row) if isinstance(row, bytes) else _checked(row)
        except ValidationError as error:
            problems += [f"{place}: {_told(one)}" for one in error.errors(include_input=False)]
        else:
            guards.append(guard if guard.name else guard.model_copy(update={"name": place}))
    if problems:
        shown = "; ".join(problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise InputError(
            f"The guards can't be used: {shown}{more}.",
            "A line is a JSON object with prompt, messages or text, and a bound; "
            "see docs/protocol.md.",
        )
    if sources and not guards:
        raise InputError("There is no guard in what was given.", "Give one JSON object a line.")
    wire = [guard.model_dump(exclude_none=True) for guard in guards]
    size = len(canonical.dumps(wire))
    if len(wire) > MAX_GUARDS or size > MAX_BYTES:
        raise InputError(
            f"There are {len(wire)} guards of {size} bytes.",
            f"Give at most {MAX_GUARDS}, of {MAX_BYTES} bytes in all.",
        )
    return wire


def _checked(row: Mapping[str, Any]) -> Guard:
    return Guard.model_validate(dict(row))


def _rows(
    sources: Sequence[GuardSource], problems: list[str]
) -> list[tuple[str, bytes | Mapping[str, Any]]]:
    rows: list[tuple[str, bytes | Mapping[str, Any]]] = []
    for number, source in enumerate(sources, 1):
        if isinstance(source, Mapping):
            rows.append((f"guard {number}", source))
            continue
        path = Path(source)
        for line, text in enumerate(_bytes(path).split(b"\n"), 1):
            place = f"{ascii(path.name)[1:-1]} line {line}"
            if not text.strip():
                continue
            try:
                if not isinstance(canonical.loads(text), dict):
                    raise ValueError("not an object")
            except ValueError as error:
                problems.append(f"{place}: {error}")
            else:
                rows.append((place[-128:], text))
    return rows


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"The guards {path} can't be read: {reason}.", "Give a JSON Lines file."
        ) from None
    if len(data) > MAX_BYTES:
        raise InputError(f"The guards {path} are larger than {MAX_BYTES} bytes.", "Use fewer.")
    return data.removeprefix(b"\xef\xbb\xbf")


def _told(error: Mapping[str, Any]) -> str:
    where = ".".join(map(str, error["loc"]))
    words = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {words}" if where else words
