"""The manifest: what a patch says about itself (docs/format.md, "Manifest")."""

from __future__ import annotations

import math
import os
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    model_validator,
)

from ..errors import UsageError
from . import canonical

FORMAT = 1
MAX_MODULES = 4096
MAX_NAME = 256
MAX_TEXT = 1024
MAX_IDS = 4096
MAX_DIMENSION = 2**24
COLUMN_BLOCKS = 48  # a weight of d_in columns carries gcd(d_in, 48) block digests

_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_TIME = "%Y-%m-%dT%H:%M:%SZ"


def timestamp() -> str:
    """Now, as RFC 3339 in UTC; the time in ``SOURCE_DATE_EPOCH`` where that is set.

    Raises:
        UsageError: ``SOURCE_DATE_EPOCH`` is not a number of seconds.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            "SOURCE_DATE_EPOCH is not a number of seconds since 1970.",
            "Set it to a whole number, or unset it.",
        ) from None
    return moment.strftime(_TIME)


def tool() -> str:
    """The name and version of this program, as written into manifests."""
    try:
        return f"patcher {version('vllm-patcher')}"
    except PackageNotFoundError:  # run from a source tree that isn't installed
        return "patcher"


def check_title(title: str | None) -> None:
    """Before any work is done: raise UsageError for a title that can't stand in a manifest."""
    if title is not None and (len(title) > MAX_TEXT or not title.isprintable()):
        raise UsageError(
            f"A title has at most {MAX_TEXT} characters, all printable.", "Give another title."
        )


def _printable(value: str) -> str:
    if not value.isprintable():  # no terminal escapes, no text that changes direction
        raise ValueError("has characters that do not print")
    return value


def _module_name(value: str) -> str:
    if not _MODULE.fullmatch(value):
        raise ValueError("is not a dotted name of ASCII letters, digits and underscores")
    return value


def _hex64(value: str) -> str:
    if not _HEX64.fullmatch(value):
        raise ValueError("is not a SHA-256 in 64 lower-case hex digits")
    return value


def _time(value: str) -> str:
    try:
        same = datetime.strptime(value, _TIME).strftime(_TIME) == value
    except ValueError:
        same = False
    if not same:
        raise ValueError("is not a UTC time like 2026-01-31T12:00:00Z")
    return value


def _unique(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) != len(values):
        raise ValueError("names something twice")
    return values


def _few_modules(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_MODULES:  # pydantic counts after it checked all
        raise ValueError(f"has more than {MAX_MODULES} modules")
    return value


Text = Annotated[str, Field(strict=True, max_length=MAX_TEXT), AfterValidator(_printable)]
ModuleName = Annotated[str, Field(strict=True, max_length=MAX_NAME), AfterValidator(_module_name)]
Sha256 = Annotated[str, Field(strict=True), AfterValidator(_hex64)]
Time = Annotated[str, Field(strict=True), AfterValidator(_time)]
# FailFast: an error takes a kilobyte, and only the first one is told.
Ids = Annotated[tuple[Sha256, ...], FailFast(), Field(max_length=MAX_IDS), AfterValidator(_unique)]
Dimension = Annotated[int, Field(strict=True, ge=1, le=MAX_DIMENSION)]
Count = Annotated[int, Field(strict=True, ge=0, le=canonical.MAX_INTEGER)]
JsonObject = Annotated[dict[str, Any], BeforeValidator(canonical.plain)]


class _Part(BaseModel):
    # Fields that this version doesn't know are kept: newer files stay readable, and whole.
    model_config = ConfigDict(frozen=True, extra="allow", hide_input_in_errors=True)


class ModuleBase(_Part):
    """The weight that a delta was computed on, always seen as ``[d_out, d_in]``.

    ``digest``: SHA-256 of its row-major little-endian bytes in ``dtype``, the dtype
    it is served in. ``blocks``: the same of ``gcd(d_in, 48)`` equal groups of columns.
    """

    shape: tuple[Dimension, Dimension]
    dtype: Literal["bfloat16", "float16", "float32"]
    digest: Sha256
    blocks: Annotated[tuple[Sha256, ...], FailFast(), Field(max_length=COLUMN_BLOCKS)]

    @model_validator(mode="after")
    def _count_blocks(self) -> ModuleBase:
        wanted = math.gcd(self.shape[1], COLUMN_BLOCKS)
        if len(self.blocks) != wanted:
            raise ValueError(f"has {len(self.blocks)} column blocks where {wanted} belong")
        return self


class Base(_Part):
    """The model that a patch was computed on."""

    model: Text
    architecture: Text
    modules: Annotated[
        dict[ModuleName, ModuleBase],
        BeforeValidator(_few_modules),
        Field(min_length=1, max_length=MAX_MODULES),
    ]


class Method(_Part):
    """How the edit was computed. Numbers are finite."""

    name: Text
    hyperparameters: JsonObject


class Requests(_Part):
    """How many facts were to be forgotten, and a commitment to which (no text of them)."""

    count: Count
    commitment: Sha256


class Manifest(_Part):
    """All that a patch says about itself; immutable; fields it doesn't know are kept.

    Making one raises ``pydantic.ValidationError`` (a ValueError) where a field is off.
    ``critical`` names fields that a reader must know to use the patch rightly.
    """

    format: Annotated[int, Field(strict=True, ge=FORMAT, le=FORMAT)] = FORMAT
    title: Text
    created: Time = Field(default_factory=timestamp)
    tool: Text = Field(default_factory=tool)
    base: Base
    method: Method
    requests: Requests
    requires: Ids = ()
    conflicts: Ids = ()
    evaluation: JsonObject | None = None
    critical: Annotated[
        tuple[Text, ...], FailFast(), Field(max_length=64), AfterValidator(_unique)
    ] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if set(self.requires) & set(self.conflicts):
            raise ValueError("requires and conflicts name the same patch")
        return self

    def canonical(self) -> bytes:
        """This manifest as canonical JSON (RFC 8785), unknown fields included.

        Raises:
            ValueError: an unknown field holds what JSON cannot.
        """
        return canonical.dumps(self.model_dump())
