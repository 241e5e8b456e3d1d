"""``patcher.attach``: the verbs of :class:`patcher.Engine` for a ``vllm.LLM`` in this process.

The client is the same, and so are routes, service and store; only the way between them
is a function call in place of a socket.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI

from patcher.client import Engine
from patcher.engine import vllm_core, worker
from patcher.engine.auth import ensure_token
from patcher.engine.lifetimes import expire
from patcher.engine.plugin import record_start
from patcher.engine.routes import PluginState, router
from patcher.engine.service import PatchService
from patcher.engine.settings import Settings, asked_for
from patcher.engine.signatures import Trust
from patcher.engine.store import Store
from patcher.engine.versions import check_vllm
from patcher.engine.vllm_offline import OfflineClient
from patcher.errors import EngineRefusedError, UsageError

T = TypeVar("T")
_ATTRIBUTE = "_patcher_attached"  # where an LLM holds what is attached to it
_URL = "http://localhost"  # a name for messages; no request leaves the process


def attach(llm: Any, *, state: str | os.PathLike[str] | None = None) -> AttachedEngine:
    """Patch a ``vllm.LLM`` of this process: all verbs of :class:`patcher.Engine`, no server.

    ``state``: a state folder, as ``patcher serve`` keeps one. The stack that was committed in
    it is restored now, and what changes is committed to it. Without it nothing outlives the
    process. A second call for the same LLM gives the same object.

    >>> import patcher
    >>> from vllm import LLM                            # with VLLM_PLUGINS=patcher set before
    >>> llm = LLM("my-model")
    >>> with patcher.attach(llm) as engine:
    ...     change = engine.apply("forget.st")
    ...     answers = llm.generate("The capital of France is")
    >>> answers = llm.generate("The capital of France is")     # the base again

    Raises :class:`~patcher.errors.UsageError` for what is no ``vllm.LLM`` and for another
    ``state`` than the LLM is attached with, and
    :class:`~patcher.errors.EngineRefusedError` where a worker lacks the plugin, another
    engine uses the folder, the committed stack can't be restored, the LLM is data-parallel,
    or ``PATCHER_DISABLE`` is set.
    """
    engine = getattr(llm, "llm_engine", None)
    if engine is None:
        raise UsageError(
            f"{type(llm).__name__} is no vllm.LLM.", "For a server use patcher.Engine(url, token)."
        )
    folder = None if state is None else Path(state).expanduser().resolve()
    attached: AttachedEngine | None = getattr(llm, _ATTRIBUTE, None)
    if attached is None:
        attached = AttachedEngine(llm, folder)
        setattr(llm, _ATTRIBUTE, attached)
    elif folder not in (None, attached.state):
        raise UsageError(
            f"This LLM is attached already, {_with(attached.state)}.", "close() that one first."
        )
    return attached


class AttachedEngine(Engine):
    """A ``vllm.LLM`` of this process with the verbs of :class:`patcher.Engine`.

    Made by :func:`attach`. The end of a ``with`` block, or :meth:`close`, gives the LLM its
    base weights back; a stack that was committed to a ``state`` folder stays committed. The
    LLM may not generate in another thread meanwhile.
    """

    def __init__(self, llm: Any, state: Path | None) -> None:
        self.state = state
        self._llm = weakref.ref(llm)  # which holds this object
        client = _client(llm.llm_engine)
        folder = state or Path(tempfile.mkdtemp(prefix="patcher-"))
        temporary = None if state else folder
        store = None
        try:
            store = Store(folder)
            store.claim(f"{os.getpid()} {secrets.token_hex(8)}")
            settings = replace(
                Settings.read(str(client.vllm_config.model_config.model)),
                state=folder,
                token_file=folder / "token",
            )
            ensure_token(store, settings.token_file)
            trust = Trust(store, settings.trust)
            record_start(store, settings, trust.told())
            self._service: PatchService = PatchService(client, store, spacing=0, trust=trust)
            self._service.watched = False
            run(_settled(self._service, self._service.restore()))
            run(_settled(self._service, expire(self._service)))  # what ran out while nothing served
        except BaseException:
            _let_go(store, temporary)
            raise
        self._release = weakref.finalize(self, _let_go, store, temporary)
        super().__init__(
            _URL,
            settings.token_file.read_text(encoding="ascii"),
            transport=_InProcess(self._service),
        )

    def __repr__(self) -> str:
        return f"AttachedEngine({_with(self.state)})"

    def __enter__(self) -> AttachedEngine:
        return self

    def close(self) -> None:
        """Give the LLM its base back, and let go of the state folder; again is fine.

        Raises what a revert raises; the LLM stays attached then.
        """
        if not self._release.alive:
            return
        llm = self._llm()
        if llm is not None:
            store = self._service.store
            with store.exclusive():
                store.suspend(True, "detach", {"held": list(store.committed().ids)})
            run(_settled(self._service, self._service.restore("detach")))
            delattr(llm, _ATTRIBUTE)
        self._release()
        super().close()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Wait for ``work``; in a notebook, whose thread has a loop that runs, from another one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


async def _settled(service: PatchService, work: Coroutine[Any, Any, T]) -> T:
    """``work``, and what it left for later: the loop ends with it."""
    try:
        return await work
    finally:
        await service.transition.settle()


class _InProcess(httpx.BaseTransport):
    """The way of a request to the routes: a call."""

    def __init__(self, service: PatchService) -> None:
        app = FastAPI()
        app.include_router(router())
        app.state.patcher = PluginState(service.store, service)
        self._app = httpx.ASGITransport(app)
        self._service = service

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Answer ``request`` with the whole body read."""
        request.read()
        return run(_settled(self._service, self._answer(request)))

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        answer = await self._app.handle_async_request(request)
        body = await answer.aread()
        return httpx.Response(answer.status_code, headers=answer.headers, content=body)


def _client(engine: Any) -> OfflineClient:
    """The engine's client; its workers must be able to have our calls."""
    client = OfflineClient(engine)
    if Settings.read("").disabled:
        raise EngineRefusedError("patcher is off: PATCHER_DISABLE is set.", "Unset it.")
    import vllm

    check_vllm(vllm.__version__)
    parallel = client.vllm_config.parallel_config
    if parallel.data_parallel_size > 1:
        raise EngineRefusedError(
            "This LLM is one of several data-parallel ones, which must change together.",
            "Serve with `patcher serve --data-parallel-size`, or use tensor parallelism.",
        )
    if client.in_process and parallel.world_size == 1:
        worker.install()  # the worker and the core are in this process too
        vllm_core.install()
    elif not asked_for():
        # Known without a call: one that every rank refuses leaves their replies off by one.
        raise EngineRefusedError(
            "The LLM's workers don't have the plugin.",
            'Set os.environ["VLLM_PLUGINS"] = "patcher" before LLM(...) starts them; it lists '
            "all of vLLM's plugins, so name the others that you need too.",
        )
    return client


def _with(state: Path | None) -> str:
    return "without a state folder" if state is None else f"with state={str(state)!r}"


def _let_go(store: Store | None, temporary: Path | None) -> None:
    if store is not None:
        store.release()
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
