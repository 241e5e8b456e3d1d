"""`patcher serve`: vLLM's own server with the plugin named, and nothing else changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from patcher.engine.settings import PLUGIN
from patcher.errors import UsageError

# Unless VLLM_PLUGINS is set, vLLM loads every plugin of these groups.
_OPEN_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)


def plugin_list(environment: Mapping[str, str]) -> str:
    """VLLM_PLUGINS with ours added; where it was unset, all that vLLM would have loaded stays."""
    given = environment.get("VLLM_PLUGINS")
    if given is None:
        names = [point.name for group in _OPEN_GROUPS for point in entry_points(group=group)]
    else:
        names = [name for name in given.split(",") if name]
    return ",".join(dict.fromkeys([*names, PLUGIN]))


def environment_for(
    environment: Mapping[str, str],
    *,
    state: Path | None,
    token_file: Path | None,
    no_restore: bool,
    trust: Path | None = None,
) -> dict[str, str]:
    """The server's environment."""
    changed = {**environment, "VLLM_PLUGINS": plugin_list(environment)}
    if state is not None:
        changed["PATCHER_STATE"] = str(state.absolute())
    if token_file is not None:
        changed["PATCHER_TOKEN_FILE"] = str(token_file.absolute())
    if trust is not None:
        changed["PATCHER_TRUST"] = str(trust.absolute())
    if no_restore:
        changed["PATCHER_NO_RESTORE"] = "1"
    return changed


def serve(
    model: str,
    vllm_args: list[str],
    *,
    state: Path | None = None,
    token_file: Path | None = None,
    no_restore: bool = False,
    trust: Path | None = None,
) -> NoReturn:
    """Become vLLM's OpenAI server for ``model``; this process is replaced.

    Raises :class:`UsageError` where vLLM isn't installed, and what
    :meth:`~patcher.signing.TrustPolicy.read` raises.
    """
    if find_spec("vllm") is None:
        raise UsageError(
            "vLLM is not installed here.",
            "pip install 'vllm-patcher[engine]' (CPU: 'vllm-patcher[engine-cpu]').",
        )
    if trust is not None:
        from patcher.signing import TrustPolicy  # a third of a second that others needn't wait

        TrustPolicy.read(trust)  # what is wrong with it shows before a model is loaded
    environment = environment_for(
        os.environ, state=state, token_file=token_file, no_restore=no_restore, trust=trust
    )
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", "patcher.engine.launch", model, *vllm_args]
    os.execve(sys.executable, command, environment)
