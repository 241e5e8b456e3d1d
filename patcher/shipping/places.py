"""Where patches lie: what a URL says, and what lies there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..address import is_remote
from ..errors import ShippingError, UsageError
from ..signing import MAX_BUNDLE_BYTES

MAX_BESIDE = 64  # things that are taken with a patch
MAX_REPORT_BYTES = 16 << 20

_PIN = re.compile(r"#sha256=([0-9a-f]{64})$")
_SECRETS = re.compile(r"(?<=//)[^/\s'\"@]*@|(?<=\?)[^\s'\")]+")
# Suffixes that make the name of what lies beside a patch; no separators, so no way out of a folder.
# Few reports can lie there, because they may be large.
BESIDE = re.compile(r"(\.[A-Za-z0-9_@+-]{1,64}){0,4}\.sig|\.report\.(html|json|txt|md|pdf)")


@dataclass(frozen=True)
class Parcel:
    """A patch file's bytes, and what lies beside it: suffix (``.alice.sig``) to bytes."""

    data: bytes
    beside: Mapping[str, bytes] = field(default_factory=dict)


class Place(Protocol):
    """One way to ship."""

    def send(self, parcel: Parcel) -> str:
        """Put it there; returns the place as a URL that names this very content, if it can."""

    def fetch(self) -> Parcel:
        """What lies there, bounded; nothing of it is checked but its length and digests."""


def parsed(url: str) -> tuple[str, str | None]:
    """The URL without its pin, and the pin: the id that must be found there.

    Raises:
        UsageError: it is no URL, chains several (fsspec's ``::``), or has another fragment.
    """
    pin = _PIN.search(url)
    bare = url[: pin.start()] if pin else url
    if not is_remote(bare):
        raise UsageError(
            f"{url} is no place to ship to.",
            "Write oci://…, hf://…, s3://…, https://… or file://….",
        )
    if "::" in bare or "#" in bare or not bare.isprintable():
        raise UsageError(
            f"{bare[:200]!r} is more than one place.", "Pin it with #sha256=<64 hex digits>."
        )
    return bare, pin.group(1) if pin else None


def shown(text: str) -> str:
    """``text`` without what may be secret in its URLs: a password, a signed query.

    >>> shown("no https://bob:secret@example.org/p.st?signature=beef")
    'no https://…@example.org/p.st?…'
    """
    return _SECRETS.sub(lambda found: "…@" if found.group().endswith("@") else "…", text)


def failed(what: str, error: Exception, cure: str) -> ShippingError:
    """What some library raised, as one of ours: its first line, without secrets."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
    return ShippingError(shown(f"{what}: {reason}."), cure)


def named_by_content(signature: bytes) -> str:
    """A suffix for a signature whose own name is not known, or taken by another."""
    return f".{hashlib.sha256(signature).hexdigest()[:16]}.sig"


def most_of(suffix: str) -> int:
    """How many bytes are read at most of what lies beside a patch under that suffix."""
    return MAX_BUNDLE_BYTES if suffix.endswith(".sig") else MAX_REPORT_BYTES


def all_of(file: Any, most: int, url: str) -> bytes:
    """What an open file has; a stream may give less at a time than it is asked for.

    Raises:
        ShippingError: it has more than ``most`` bytes; no more than one of those was asked for.
    """
    data = bytearray()
    while len(data) <= most and (part := file.read(min(most + 1 - len(data), 1 << 20))):
        data += part
    if len(data) > most:
        raise ShippingError(
            f"{shown(url)} is larger than {most} bytes, the most that is read.",
            "Is that the right file?",
        )
    return bytes(data)
