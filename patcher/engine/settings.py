"""What the environment says: read in one place, by every process of the server."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PLUGIN = "patcher"  # the entry points' name, as VLLM_PLUGINS names it
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

    ``PATCHER_STATE`` (folder), ``PATCHER_TOKEN_FILE``, and the kill switches
    ``PATCHER_NO_RESTORE=1`` (this start leaves the committed stack out) and
    ``PATCHER_DISABLE=1`` (nothing of patcher runs but the record that it was disabled).
    """

    state: Path
    token_file: Path
    no_restore: bool
    disabled: bool

    @classmethod
    def read(cls, model: str, environment: Mapping[str, str] = os.environ) -> Settings:
        """The settings for ``model`` from ``environment``."""
        given = environment.get("PATCHER_STATE")
        state = Path(given).expanduser() if given else default_state(model, environment)
        token = environment.get("PATCHER_TOKEN_FILE")
        return cls(
            state=state,
            token_file=Path(token).expanduser() if token else state / "token",
            no_restore=environment.get("PATCHER_NO_RESTORE", "").lower() in _TRUE,
            disabled=disabled(environment),
        )


def disabled(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether PATCHER_DISABLE is set."""
    return environment.get("PATCHER_DISABLE", "").lower() in _TRUE
