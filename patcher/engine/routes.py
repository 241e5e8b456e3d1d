"""The HTTP protocol of ``docs/protocol.md``: words and status codes, no logic."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from patcher.durations import LONGEST
from patcher.engine import openapi, spans
from patcher.engine.auth import Role, authorise
from patcher.engine.mixed import MixedRequests
from patcher.engine.planning import plan
from patcher.engine.service import PatchService
from patcher.engine.store import Store
from patcher.errors import (
    EngineRefusedError,
    InvalidPatchError,
    PatcherError,
    StackChangedError,
    UsageError,
)
from patcher.guards import MAX_GUARDS, Guard
from patcher.patch import Patch
from patcher.patch.container import MAX_FILE_BYTES
from patcher.protocol import ROUTE, InFlight
from patcher.signing import MAX_BUNDLE_BYTES, by_subject
from patcher.text import shown

MAX_BODY_BYTES = 1 << 20  # of a request that isn't a patch
MAX_PLAN_BYTES = 1 << 28  # patches in base64
SHOWN = 5  # wrong fields of a body that a message names
logger = logging.getLogger("vllm.patcher")
MOST_OF_CLIENT = 200  # characters of what a request says it was made with
Answer = Callable[[PatchService, Request, str], Awaitable[Response]]


@dataclass(frozen=True)
class PluginState:
    """What routes and middleware find in the app's state. ``off``: why there is no service."""

    store: Store | None
    service: PatchService | None = None
    off: str = ""
    mixed: MixedRequests | None = None


class StackWanted(BaseModel):
    """The body of ``PUT stack``: the ids wanted, bottom first."""

    model_config = ConfigDict(extra="forbid")

    stack: list[str] = Field(max_length=4096)
    in_flight: InFlight = "recompute"
    reason: str = Field(default="", max_length=1024)
    guards: list[Guard] = Field(default=[], max_length=MAX_GUARDS)
    ttl: float | None = Field(default=None, gt=0, le=LONGEST, allow_inf_nan=False)


class ToPlan(BaseModel):
    """The body of ``POST plan``: files' bytes and bundles, each in base64."""

    model_config = ConfigDict(extra="forbid", val_json_bytes="base64")

    patches: list[bytes] = Field(min_length=1, max_length=256)
    signatures: list[bytes] = Field(default=[], max_length=1024)


class ToConfirm(BaseModel):
    """The body of ``POST confirm``: the ids that are to stay, or null for all."""

    model_config = ConfigDict(extra="forbid")

    patches: list[str] | None = Field(max_length=4096)


def problem(error: PatcherError) -> JSONResponse:
    """The error as ``application/problem+json`` (RFC 9457)."""
    body = {
        **error.details,
        "type": f"urn:patcher:error:{error.code}",
        "title": error.code.replace("-", " "),
        "status": error.http_status,
        "detail": error.message,
        "cure": error.cure,
        "code": error.code,
    }
    headers = {"WWW-Authenticate": "Bearer"} if error.http_status == 401 else None
    return JSONResponse(body, error.http_status, headers, media_type="application/problem+json")


def _guarded(role: Role, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    """Check the token, then answer; every error becomes a problem document."""

    async def endpoint(request: Request) -> Response:
        try:
            state: PluginState = request.app.state.patcher
            if state.store is not None:  # else nobody has a token
                actor = authorise(state.store, request.headers.get("authorization"), role)
            if state.service is None:
                raise EngineRefusedError(f"patcher is off on this server: {state.off}.")
            with spans.caller(request.headers):
                return await answer(state.service, request, actor)
        except PatcherError as error:
            return problem(error)
        except Exception:
            logger.exception("patcher: unforeseen error in %s", request.url.path)
            return problem(PatcherError("An unforeseen error; the server's log has it."))

    return endpoint


async def _body(request: Request, limit: int, error: type[PatcherError]) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise error(f"The body is larger than {limit} bytes.", "Send less.")
    return bytes(data)


def _client(request: Request) -> str:
    """What the request says that it was made with, as the ledger keeps it. Not proven."""
    told = request.headers.get("user-agent", "")[:MOST_OF_CLIENT]
    return "".join(one if one.isprintable() else "?" for one in told)


async def _status(service: PatchService, request: Request, actor: str) -> Response:
    return JSONResponse(await service.status())


async def _upload(service: PatchService, request: Request, actor: str) -> Response:
    data = await _body(request, MAX_FILE_BYTES, InvalidPatchError)
    patch, added = await asyncio.to_thread(service.upload, data, actor, _client(request))
    ranks = {name: delta.rank for name, delta in patch.deltas.items()}
    body = {"id": patch.id, "bytes": len(data), "modules": ranks}
    return JSONResponse(body, 201 if added else 200)


async def _patches(service: PatchService, request: Request, actor: str) -> Response:
    in_force = service.store.in_force().ids
    listed = [
        {"id": p.id, "title": p.title, "bytes": p.bytes, "stored": p.stored}
        | {"in_force": p.id in in_force}
        for p in service.store.patches()
    ]
    return JSONResponse({"patches": listed})


async def _patch(service: PatchService, request: Request, actor: str) -> Response:
    data = await asyncio.to_thread(service.store.patch_bytes, request.path_params["patch_id"])
    return Response(data, media_type="application/octet-stream")


async def _sign(service: PatchService, request: Request, actor: str) -> Response:
    bundle = await _body(request, MAX_BUNDLE_BYTES, InvalidPatchError)
    patch_id = request.path_params["patch_id"]
    added, signer = await asyncio.to_thread(service.trust.add, patch_id, bundle, actor)
    return JSONResponse({"patch": patch_id, "signer": signer}, 201 if added else 200)


async def _signatures(service: PatchService, request: Request, actor: str) -> Response:
    patch_id = request.path_params["patch_id"]
    await asyncio.to_thread(service.store.patch_bytes, patch_id)  # refuses an unknown one
    found = await asyncio.to_thread(service.store.signatures, patch_id)
    # As they are stored, which is canonical JSON.
    body = b'{"signatures":[' + b",".join(found) + b"]}"
    return Response(body, media_type="application/json")


async def _plan(service: PatchService, request: Request, actor: str) -> Response:
    try:
        body = await _body(request, MAX_PLAN_BYTES, UsageError)
        wanted = await asyncio.to_thread(ToPlan.model_validate_json, body)
    except ValidationError:
        raise UsageError(
            "The body is no plan.", "Send patches and signatures, each a list of base64."
        ) from None
    patches = [await asyncio.to_thread(Patch.from_bytes, data) for data in wanted.patches]
    bundles = await asyncio.to_thread(by_subject, wanted.signatures)
    planning = asyncio.ensure_future(plan(service, patches, bundles))
    return JSONResponse(await asyncio.shield(planning))


async def _put_stack(service: PatchService, request: Request, actor: str) -> Response:
    try:
        wanted = StackWanted.model_validate_json(await _body(request, MAX_BODY_BYTES, UsageError))
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False, include_context=False)
        fields = ", ".join(".".join(map(str, e["loc"])) or "body" for e in wrong[:SHOWN])
        cause = f"The body is not a stack: {shown(fields, 300)}."
        raise UsageError(cause, "See docs/protocol.md.") from None
    if_match = request.headers.get("if-match", "").strip().strip('"')
    if not if_match:
        raise _PreconditionRequiredError(
            "If-Match is missing.", "Send the weight version that `GET status` gave."
        )
    # A client that hangs up must not leave a change half-way.
    change = asyncio.ensure_future(
        service.change(
            wanted.stack,
            if_match=if_match,
            in_flight=wanted.in_flight,
            actor=actor,
            client=_client(request),
            reason=wanted.reason,
            guards=wanted.guards,
            ttl=wanted.ttl,
        )
    )
    outcome = await asyncio.shield(change)
    return JSONResponse(outcome.as_dict(), headers={"ETag": f'"{outcome.stack.version}"'})


async def _confirm(service: PatchService, request: Request, actor: str) -> Response:
    try:
        wanted = ToConfirm.model_validate_json(await _body(request, MAX_BODY_BYTES, UsageError))
    except ValidationError:
        raise UsageError(
            "The body doesn't say what to confirm.", "Send patches: a list of ids, or null for all."
        ) from None
    confirmed = await service.confirm(wanted.patches, actor, _client(request))
    return JSONResponse({"confirmed": confirmed})


class _PreconditionRequiredError(StackChangedError):
    http_status = 428


async def _verify(service: PatchService, request: Request, actor: str) -> Response:
    return JSONResponse(await service.verify())


async def _heal(service: PatchService, request: Request, actor: str) -> Response:
    healing = asyncio.ensure_future(service.heal(actor, _client(request)))
    return JSONResponse(await asyncio.shield(healing))


async def _health(request: Request) -> Response:
    """Without a token, since probes have none: it tells that something is wrong, not what."""
    state: PluginState = request.app.state.patcher
    wrong = [] if state.service is None else await state.service.health()
    body = {"ok": not wrong, "wrong": wrong, "off": state.service is None}
    return JSONResponse(body, 503 if wrong else 200)


async def _ledger(service: PatchService, request: Request, actor: str) -> Response:
    after = request.query_params.get("after", "0")
    if not (after.isascii() and after.isdigit() and len(after) < 16):
        raise UsageError("`after` is not a number.", "Give the last seq that you have.")
    entries = await asyncio.to_thread(service.store.ledger, int(after))
    return JSONResponse({"entries": entries})


_TABLE: tuple[tuple[str, str, Role, Answer, type[BaseModel] | None], ...] = (
    ("GET", "/status", Role.read, _status, None),
    ("POST", "/patches", Role.apply, _upload, None),
    ("GET", "/patches", Role.read, _patches, None),
    ("GET", "/patches/{patch_id}", Role.read, _patch, None),
    ("POST", "/patches/{patch_id}/signatures", Role.apply, _sign, None),
    ("GET", "/patches/{patch_id}/signatures", Role.read, _signatures, None),
    ("PUT", "/stack", Role.apply, _put_stack, StackWanted),
    ("POST", "/plan", Role.apply, _plan, ToPlan),
    ("POST", "/confirm", Role.apply, _confirm, ToConfirm),
    ("POST", "/verify", Role.read, _verify, None),
    ("POST", "/heal", Role.apply, _heal, None),
    ("GET", "/ledger", Role.read, _ledger, None),
)


def router() -> APIRouter:
    """All routes, each behind a token but for health and what describes them."""
    routes = APIRouter(prefix=ROUTE, tags=["patcher"])
    for method, path, role, answer, body in _TABLE:
        routes.add_api_route(
            path,
            _guarded(role, answer),
            methods=[method],
            response_model=None,
            name=answer.__name__.strip("_"),
            **openapi.told(method, path, body),
        )
    routes.add_api_route(
        "/health", _health, methods=["GET"], response_model=None, **openapi.health()
    )

    @functools.cache  # made when it is first asked for: a start needn't wait for it
    def described() -> Response:
        return JSONResponse(openapi.document(routes))

    async def _openapi() -> Response:
        return described()

    routes.add_api_route("/openapi.json", _openapi, methods=["GET"], include_in_schema=False)
    return routes
