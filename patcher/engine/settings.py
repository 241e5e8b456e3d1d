"""What the environment says: read in one place, by every process of the server."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from patcher.errors import UsageError

PLUGIN = "patcher"  # the entry points' name, as VLLM_PLUGINS names it
DEFAULT_OVERLAY_RANK = 64
DEFAULT_LONGEST = 10.0  # seconds that a change waits at most (patcher.engine.spacing)
LONGEST = 60.0  # that may be set: a change behind it waits three minutes for the lock
_TRUE = {"1", "true", "yes", "on"}


def asked_for(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether VLLM_PLUGINS names us; vLLM loads general plugins unasked, ours stays inert."""
    return PLUGIN in environment.get("VLLM_PLUGINS", "").split(",")


def default_state(model: str, environment: Mapping[str, str] = os.environ) -> Path:
    """The state folder of ``model``, a hub id or a directory, where none is given."""
    model = str(Path(model).resolve()) if Path(model).exists() else model
    home = environment.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "vllm-patcher" / re.sub(r"[^A-Za-z0-9._-]+", "--", model.strip("/"))


@dataclass(frozen=True)
class Settings:
    """The plugin's settings.

    ``PATCHER_STATE`` (folder), ``PATCHER_TOKEN_FILE``, ``PATCHER_TRUST`` (the trust policy's file;
    without it patches need no signature), and the kill switches
    ``PATCHER_NO_RESTORE=1`` (this start leaves the committed stack out) and
    ``PATCHER_DISABLE=1`` (nothing of patcher runs but the record that it was disabled).
    ``PATCHER_SPACING``: seconds that a change waits at most for requests that the one before
    had recomputed (:mod:`patcher.engine.spacing`); 0 turns that off. ``PATCHER_OVERLAY_RANK``:
    what quantised modules are loaded with room for (:mod:`patcher.engine.vllm_overlay`).
    """

    state: Path
    token_file: Path
    no_restore: bool
    disabled: bool
    spacing: float = DEFAULT_LONGEST
    trust: Path | None = None

    @classmethod
    def read(cls, model: str, environment: Mapping[str, str] = os.environ) -> Settings:
        """The settings for ``model`` from ``environment``."""
        given = environment.get("PATCHER_STATE")
        state = Path(given).expanduser() if given else default_state(model, environment)
        token = environment.get("PATCHER_TOKEN_FILE")
        trust = environment.get("PATCHER_TRUST")
        overlay_rank(environment)  # the workers' processes would only log what is wrong with it
        return cls(
            state=state,
            token_file=Path(token).expanduser() if token else state / "token",
            no_restore=is_set("PATCHER_NO_RESTORE", environment),
            disabled=disabled(environment),
            spacing=_seconds("PATCHER_SPACING", environment, DEFAULT_LONGEST, LONGEST),
            trust=Path(trust).expanduser() if trust else None,
        )


def _seconds(name: str, environment: Mapping[str, str], default: float, longest: float) -> float:
    """A duration from the environment; raises :class:`UsageError` where it isn't one."""
    given = environment.get(name) or str(default)
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= longest:
        raise UsageError(
            f"{name} is {given!r}.", f"Give seconds from 0 to {longest:.0f}, or leave it out."
        )
    return seconds


def overlay_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The rank that a quantised module has room for; raises :class:`UsageError`."""
    given = environment.get("PATCHER_OVERLAY_RANK") or str(DEFAULT_OVERLAY_RANK)
    if not re.fullmatch(r"\d{1,5}", given):
        raise UsageError(
            f"PATCHER_OVERLAY_RANK is {given!r}.", "Give a number, 0 for none, or leave it out."
        )
    return int(given)


def is_set(name: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the switch ``name`` is on."""
    return environment.get(name, "").lower() in _TRUE


def disabled(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether PATCHER_DISABLE is set."""
    return is_set("PATCHER_DISABLE", environment)
