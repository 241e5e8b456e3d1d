"""Points in time as the ledger writes them and as people give them: RFC 3339."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

from patcher.errors import UsageError

_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def rfc3339(at: datetime) -> str:
    """A moment in UTC, RFC 3339 with milliseconds."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc(at: float) -> str:
    """Seconds since 1970 in UTC, RFC 3339 with milliseconds."""
    return rfc3339(datetime.fromtimestamp(at, UTC))


def now() -> str:
    """The time in UTC, RFC 3339 with milliseconds."""
    return utc(time.time())


def moment(text: str) -> datetime:
    """The moment that an RFC 3339 text names, in UTC.

    Raises :class:`~patcher.errors.UsageError` for anything else, also for a time without zone.

    >>> moment("2026-11-24T04:00:00+01:00").isoformat()
    '2026-11-24T03:00:00+00:00'
    """
    try:
        if not _RFC_3339.fullmatch(text):
            raise ValueError
        return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise UsageError(
            f"{text[:40]!r} is not a time.", "Write it like 2026-11-24T03:00:00Z (RFC 3339)."
        ) from None
