"""vLLM's two entry points: a general plugin for the workers, an endpoint plugin for HTTP.

Read in vLLM 0.32.0: ``vllm/plugins/__init__.py`` and
``vllm/plugins/endpoint_plugins/interface.py``. Neither needs vLLM's development mode.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from patcher.engine.settings import PLUGIN, Settings, asked_for, disabled

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State

logger = logging.getLogger("vllm.patcher")


def register() -> None:
    """Give every vLLM worker patcher's calls; nothing where patcher isn't asked for."""
    if not asked_for() or disabled():
        return
    from patcher.engine.worker import install

    install()


class PatcherEndpoint:
    """Adds the routes and, before the first request is served, restores the stack."""

    name = PLUGIN
    required_tasks: tuple[str, ...] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Register the routes; called once while vLLM builds its app."""
        from patcher.engine.routes import router

        app.include_router(router())

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Open the store, make the token, restore the stack.

        Whatever fails is raised: vLLM then ends without having served a request.
        """
        if engine_client is None:
            state.patcher_off = "this server has no engine"
            return
        from patcher.engine.auth import ensure_token
        from patcher.engine.service import PatchService
        from patcher.engine.store import Store

        settings = Settings.read(args.model)
        store = Store(settings.state)
        if settings.disabled:
            state.patcher_off = "PATCHER_DISABLE is set"
            _start_without(store, "start-disabled")
            return
        made = ensure_token(store, settings.token_file)
        logger.info(
            "patcher: state in %s, %s token in %s",
            settings.state,
            "new" if made else "admin",
            settings.token_file,
        )
        if settings.no_restore:
            _start_without(store, "start-without-restore")
        else:
            store.suspend(False, "start", {"stack": list(store.committed().ids)})
        service = PatchService(engine_client, store)
        await service.restore()
        state.patcher = service


def _start_without(store: Any, event: str) -> None:
    held = list(store.committed().ids)
    logger.warning("patcher: %s; %d committed patches are not in force", event, len(held))
    store.suspend(True, event, {"held": held})


def endpoint_plugin() -> PatcherEndpoint:
    """The factory that vLLM calls."""
    return PatcherEndpoint()
