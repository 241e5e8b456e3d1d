"""vLLM's two entry points: a general plugin for the workers, an endpoint plugin for HTTP.

Read in vLLM 0.32.0: ``vllm/plugins/__init__.py`` and
``vllm/plugins/endpoint_plugins/interface.py``. Neither needs vLLM's development mode.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher.engine.settings import PLUGIN, Settings, asked_for, disabled, overlay_rank

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State

    from patcher.engine.store import Store

logger = logging.getLogger("vllm.patcher")


def register() -> None:
    """Give every vLLM worker patcher's calls; nothing where patcher isn't asked for."""
    if not asked_for() or disabled():
        return
    from patcher.engine import vllm_core, vllm_overlay, worker

    worker.install()
    vllm_core.install()
    vllm_overlay.install(overlay_rank())


class PatcherEndpoint:
    """Adds the routes and, before the first request is served, restores the stack."""

    name = PLUGIN
    required_tasks: tuple[str, ...] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Register the routes; called once while vLLM builds its app."""
        from patcher.engine.routes import router
        from patcher.engine.stamp import WeightVersionMiddleware

        app.include_router(router())
        app.add_middleware(WeightVersionMiddleware)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Open the store, make the token, restore the stack.

        Whatever fails is raised: vLLM then ends without having served a request.
        """
        began = time.monotonic()
        import vllm

        from patcher.engine import stamp, vllm_client
        from patcher.engine.auth import ensure_token
        from patcher.engine.lifetimes import expire, watch
        from patcher.engine.routes import PluginState
        from patcher.engine.service import PatchService
        from patcher.engine.signatures import Trust
        from patcher.engine.versions import check_vllm

        if engine_client is None:
            state.patcher = PluginState(None, off="it has no engine")
            return
        if disabled():
            state.patcher = PluginState(_noted(args), off="PATCHER_DISABLE is set")
            return
        settings, store = _claimed(args)
        made = ensure_token(store, settings.token_file)
        logger.info(
            "patcher: state in %s, %s token in %s",
            settings.state,
            "new" if made else "admin",
            settings.token_file,
        )
        trust = Trust(store, settings.trust)  # first: a start with a wrong policy is none
        record_start(store, settings, trust.told())
        check_vllm(vllm.__version__)
        service = PatchService(engine_client, store, settings.spacing, trust)
        await service.restore(fresh=True)
        await expire(service)  # what ran out while nothing served
        vllm_client.watch_requests(engine_client, stamp.seen)
        state.patcher = PluginState(store, service, mixed=service.transition.mixed)
        logger.info(
            "patcher: ready after %.2f s, %d patches in force",
            time.monotonic() - began,
            len(store.in_force().ids),
        )
        self._watch = asyncio.create_task(watch(service))  # as long as the server


def _claimed(args: Namespace) -> tuple[Settings, Store]:
    """The settings, and the state folder that they name, held for this engine."""
    from patcher.engine.store import Store

    settings = Settings.read(args.model)
    store = Store(settings.state)
    store.claim(_instance(args))
    return settings, store


def _noted(args: Namespace) -> Store | None:
    """The store, with a start that is to do without patches in it; None where that can't be.

    Whoever starts without patches may do so because something of ours is broken.
    """
    try:
        settings, store = _claimed(args)
        record_start(store, settings, None)
    except Exception:
        logger.exception("patcher: disabled; this start could not be recorded")
        return None
    return store


def _instance(args: Namespace) -> str:
    """What the API-server processes of one engine have in common: vLLM starts them from one.

    A number of a process alone would be the same in every container.
    """
    several = (getattr(args, "api_server_count", None) or 1) > 1
    process = os.getppid() if several else os.getpid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        began = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {process} {began}"
    except (OSError, IndexError):  # a system without /proc
        return str(process)


def record_start(store: Store, settings: Settings, trust: dict[str, Any] | None) -> None:
    """Note a start, its trust policy, and whether it restores the committed stack."""
    without = settings.disabled or settings.no_restore
    event = "start-disabled" if settings.disabled else "start-without-restore"
    with store.exclusive(math.inf):  # another API server may be changing the stack
        held = list(store.committed().ids)
        detail = {"held" if without else "stack": held, **({"trust": trust} if trust else {})}
        store.suspend(without, event if without else "start", detail)
    if without:
        logger.warning("patcher: %d committed patches are not in force by this start", len(held))


def endpoint_plugin() -> PatcherEndpoint:
    """The factory that vLLM calls."""
    return PatcherEndpoint()
