"""What the routes take and answer, as OpenAPI: in vLLM's own document, and in one of ours.

The words are those of ``docs/protocol.md``; the shapes come from the types that client and
server share, so they can't drift apart.
"""

from __future__ import annotations

import functools
from typing import Any, NotRequired

from fastapi import APIRouter, FastAPI, Security
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer
from pydantic import BaseModel, TypeAdapter
from typing_extensions import TypedDict

from patcher.protocol import (
    Change,
    GuardResult,
    LedgerEntry,
    Plan,
    Signed,
    Status,
    StoredPatch,
    Uploaded,
    Verification,
)

OCTETS = "application/octet-stream"
PROBLEM = "application/problem+json"

#: Only told: :func:`patcher.engine.auth.authorise` is what checks a token.
TOKEN = Security(HTTPBearer(scheme_name="patcher", description="A token of the plugin's own."))
TOKEN.dependency.auto_error = False


class Problem(TypedDict):
    """An error (RFC 9457); the last four only with some codes."""

    type: str
    title: str
    status: int
    detail: str
    cure: str
    code: str
    change: NotRequired[str]
    stack: NotRequired[list[str]]
    weight_version: NotRequired[str]
    modules: NotRequired[list[str]]
    guards: NotRequired[list[GuardResult]]
    rule: NotRequired[str]
    patch: NotRequired[str]


class Signatures(TypedDict):
    """The signatures of a patch: Sigstore bundles, oldest first."""

    signatures: list[dict[str, Any]]


class Patches(TypedDict):
    """All patches that the engine holds."""

    patches: list[StoredPatch]


class Confirmed(TypedDict):
    """The ids that stay now and would not have."""

    confirmed: list[str]


class Ledger(TypedDict):
    """Entries of the ledger, oldest first."""

    entries: list[LedgerEntry]


class Health(TypedDict):
    """Whether something is wrong, as words."""

    ok: bool
    wrong: list[str]
    off: bool


_ID = {
    "name": "patch_id",
    "in": "path",
    "required": True,
    "description": "sha256 of the file's bytes",
    "schema": {"type": "string"},
}
_AFTER = {
    "name": "after",
    "in": "query",
    "description": "the last `seq` that you have",
    "schema": {"type": "string", "pattern": "^[0-9]{1,15}$", "default": "0"},
}
_IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "required": True,
    "description": "the weight version that the wish is based on",
    "schema": {"type": "string"},
}
_ETAG = {"ETag": {"description": "the weight version", "schema": {"type": "string"}}}

# Route: what it does, what it answers, the codes of its refusals, its parameters.
_ROUTES: dict[tuple[str, str], tuple[str, Any, tuple[int, ...], list[dict[str, Any]]]] = {
    ("GET", "/status"): ("What is in force", Status, (), []),
    ("POST", "/patches"): ("Store a patch", Uploaded, (422,), []),
    ("GET", "/patches"): ("The stored patches", Patches, (), []),
    ("GET", "/patches/{patch_id}"): ("A patch's file", None, (404,), [_ID]),
    ("POST", "/patches/{patch_id}/signatures"): ("Store a signature", Signed, (404, 422), [_ID]),
    ("GET", "/patches/{patch_id}/signatures"): ("Its signatures", Signatures, (404,), [_ID]),
    ("POST", "/plan"): ("What a change would do", Plan, (400, 422), []),
    ("PUT", "/stack"): ("Change it", Change, (400, 404, 409, 412, 422, 428), [_IF_MATCH]),
    ("POST", "/confirm"): ("Let patches stay", Confirmed, (400, 404, 409), []),
    ("POST", "/verify"): ("Read the live weights", Verification, (), []),
    ("POST", "/heal"): ("Put the stack back", Verification, (), []),
    ("GET", "/ledger"): ("Who changed what when", Ledger, (400,), [_AFTER]),
}
_STORING = {("POST", "/patches"), ("POST", "/patches/{patch_id}/signatures")}
_ALWAYS = (401, 403, 500, 503)  # no token, too weak a one, a defect or drift, refused or off


def told(method: str, path: str, body: type[BaseModel] | None) -> dict[str, Any]:
    """Keywords of ``add_api_route`` that describe a route whose JSON body is ``body``."""
    summary, answer, refusals, parameters = _ROUTES[method, path]
    responses = {code: _refusal() for code in (*refusals, *_ALWAYS)}
    responses[200] = {"content": {OCTETS: {"schema": _BYTES}}} if answer is None else _json(answer)
    responses[200]["description"] = "Done"
    extra: dict[str, Any] = {"parameters": parameters} if parameters else {}
    if (method, path) in _STORING:
        responses[201] = {**_json(answer), "description": "Stored; it was not there before"}
        extra["requestBody"] = {"required": True, "content": {OCTETS: {"schema": _BYTES}}}
    if path == "/stack":
        responses[200]["headers"] = _ETAG
    if body is not None:
        schema = _inlined(body.model_json_schema())
        extra["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return {
        "summary": summary,
        "responses": responses,
        "openapi_extra": extra,
        "dependencies": [TOKEN],
    }


def health() -> dict[str, Any]:
    """The same of the route that wants no token."""
    return {
        "summary": "Whether something is wrong",
        "responses": {
            200: {**_json(Health), "description": "All is well"},
            503: {**_json(Health), "description": "Something is wrong"},
        },
    }


def document(routes: APIRouter) -> dict[str, Any]:
    """The OpenAPI document of ``routes`` alone."""
    alone = FastAPI()
    alone.include_router(routes)
    return get_openapi(
        title="patcher",
        version="1",
        summary="The engine's protocol of patcher",
        description="In full: docs/protocol.md.",
        routes=alone.routes,
    )


_BYTES = {"type": "string", "format": "binary"}


def _json(kind: Any) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": _schema(kind)}}}


def _refusal() -> dict[str, Any]:
    return {
        "description": "Refused",
        "content": {PROBLEM: {"schema": _schema(Problem)}},
    }


@functools.cache  # of a refusal it is asked for sixty times, at every start
def _schema(kind: Any) -> dict[str, Any]:
    return _inlined(TypeAdapter(kind).json_schema())


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` without references: a part of another document can't refer to itself."""
    parts = schema.get("$defs", {})

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return plain(parts[value["$ref"].removeprefix("#/$defs/")])
        return {key: plain(item) for key, item in value.items() if key != "$defs"}

    result: dict[str, Any] = plain(schema)
    return result
