"""Where an engine is: URLs and tokens, checked before they are used."""

from __future__ import annotations

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

from patcher.errors import UsageError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_CURE = "Write the server's root, like http://127.0.0.1:8000."


def checked_url(url: str) -> str:
    """The root of an http(s) server without a slash at its end.

    Raises :class:`~patcher.errors.UsageError` for anything else, and for a URL that
    carries a password (it would end up in messages).

    >>> checked_url("http://127.0.0.1:8000/")
    'http://127.0.0.1:8000'
    """
    if not url:
        raise UsageError("No engine named.", "Give its URL, or set PATCHER_ENGINE.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UsageError("The engine's URL can't be read.", _CURE) from None
    if parts.username is not None or parts.password is not None:
        raise UsageError("The engine's URL carries a password.", "Set PATCHER_TOKEN instead.")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UsageError(f"{url!r} is not an http(s) URL.", _CURE)
    path = parts.path.rstrip("/")
    if parts.query or parts.fragment or path.endswith(("/v1", "/plugins")) or not url.isprintable():
        raise UsageError(f"{url!r} is more than the server's root.", _CURE)
    return f"{parts.scheme}://{parts.netloc}{path}"


def host_of(url: str) -> str:
    """The URL's host, an IPv6 address in brackets.

    >>> host_of("http://[::1]:8000")
    '[::1]'
    """
    host = urlsplit(url).hostname or ""
    return f"[{host}]" if ":" in host else host


def is_loopback(url: str) -> bool:
    """Whether the URL's host is this very machine.

    >>> is_loopback("http://[::1]:8000"), is_loopback("https://engine.example")
    (True, False)
    """
    host = host_of(url).strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def checked_token(token: str) -> str:
    """The token without surrounding space.

    Raises :class:`~patcher.errors.UsageError`, without showing it, where it can't be sent in
    a header.
    """
    token = token.strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise UsageError(
            "The token has characters that a token can't have.", "Is it the right file or variable?"
        )
    return token


def request_headers(token: str) -> dict[str, str]:
    """What every request carries: the token, and what it is made with, which the ledger keeps."""
    from importlib.metadata import PackageNotFoundError, version  # slow, and few ask

    try:
        ours = f"patcher/{version('vllm-patcher')}"
    except PackageNotFoundError:  # run from a source tree that isn't installed
        ours = "patcher"
    return {"User-Agent": ours} | ({"Authorization": f"Bearer {token}"} if token else {})


def is_remote(text: str) -> bool:
    """Whether ``text`` is a URL, of whatever kind, rather than the path of a file."""
    return bool(_SCHEME.match(text))
