"""What an engine's answers say: a JSON object, or a problem document as one of our errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from patcher.errors import (
    EngineUnreachableError,
    PatcherError,
    PermissionDeniedError,
    by_code,
)

_NO_PLUGIN = (
    "Start it with `patcher serve`, or set VLLM_PLUGINS=patcher for `vllm serve`; "
    "`patcher doctor --engine URL` looks closer."
)


def json_object(answer: httpx.Response) -> dict[str, Any] | None:
    """The JSON object in ``answer``'s body; None where there is none."""
    try:
        value = answer.json()
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def is_entry(value: Any) -> bool:
    """Whether that is an entry of a ledger, by the fields that it has at least."""
    return isinstance(value, dict) and {"seq", "time", "event", "detail"} <= value.keys()


def refusal(answer: httpx.Response, url: str) -> PatcherError:
    """The error that an answer without success means.

    The plugin's are RFC 9457; anything else came from something in front or instead of it.
    """
    problem = json_object(answer) or {}
    code = _problem_code(problem)
    detail, cure = str(problem.get("detail") or ""), str(problem.get("cure") or "")
    if code and by_code(code) is not PatcherError:
        return by_code(code)(detail or code, cure, **_details(problem))
    if answer.status_code in (401, 403):
        return PermissionDeniedError(
            detail or f"{url} refused the token.",
            "Set PATCHER_TOKEN to an admin token of the plugin (`patcher serve` prints the "
            "path of the first one); vLLM's API key opens nothing here.",
        )
    if code:
        return PatcherError(detail or f"The engine answered {code}.", cure)
    if answer.status_code == 404:
        return EngineUnreachableError(
            f"A server answers at {url}, but the patcher plugin is not loaded in it.",
            _NO_PLUGIN,
        )
    return EngineUnreachableError(
        f"{url} answered HTTP {answer.status_code}, not in patcher's protocol.",
        "Look at the log of the engine, and of any proxy in front of it.",
    )


def _details(problem: Mapping[str, Any]) -> dict[str, Any]:
    known = {"type", "title", "status", "detail", "cure", "code", "message"}
    return {key: value for key, value in problem.items() if key not in known}


def _problem_code(problem: Mapping[str, Any]) -> str:
    code, kind = problem.get("code"), problem.get("type")
    if not isinstance(code, str) and isinstance(kind, str):
        code = kind.removeprefix("urn:patcher:error:") if kind.startswith("urn:patcher:") else ""
    return code if isinstance(code, str) else ""
