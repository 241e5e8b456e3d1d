"""Where patches lie: what a URL says, and what lies there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import UsageError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_PIN = re.compile(r"#sha256=([0-9a-f]{64})$")
# Suffixes that make the name of what lies beside a patch; no separators, so no way out of a folder.
BESIDE = re.compile(r"(\.[A-Za-z0-9_@+-]{1,64}){0,4}\.(sig|report\.(html|json|txt|md|pdf))")


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


def is_remote(text: str) -> bool:
    """Whether ``text`` is a URL rather than the path of a file."""
    return bool(_SCHEME.match(text))


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


def checked_beside(suffixes: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """Those of ``suffixes`` that can be written beside a file; the others are somebody's trick."""
    return {name: data for name, data in suffixes.items() if BESIDE.fullmatch(name)}
