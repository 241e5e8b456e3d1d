"""Strangers' requests to the routes, made from the OpenAPI document that they are described by.

The routes, the service, the store and the workers are the real ones; only vLLM is played.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import schemathesis
import torch
from fastapi import FastAPI
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks
from starlette.testclient import TestClient

from patcher.engine import openapi, vllm_client
from patcher.engine.auth import Role
from patcher.engine.routes import PluginState, router
from patcher.engine.service import PatchService
from patcher.engine.store import Store
from patcher.protocol import ROUTE
from tests.engine.fake_vllm import D_IN, D_OUT, RANKS, FakeClient
from tests.engine.test_faults import make
from tests.patch import mutations

TOKEN = "a-token-that-may-change-things"
READER = "a-token-that-may-only-read"
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.ignored_auth,
    checks.negative_data_rejection,
    checks.missing_required_header,
    checks.unsupported_method,
    checks.allow_header_conformance,
]


OPERATIONS = [
    (path, method.upper())
    for path, methods in openapi.document(router())["paths"].items()
    for method in methods
]
EXAMPLES = 40
# Nothing in it can be sent otherwise than rightly.
OPEN = f"{ROUTE}/health"


class Played:
    """The app, its played engine, and patches for it."""

    def __init__(self, folder: Path) -> None:
        draw = torch.Generator().manual_seed(0)
        weights = [torch.randn(D_OUT, D_IN, generator=draw).bfloat16() for _ in range(3)]
        self.store = Store(folder / "state")
        self.store.set_token("owner", Role.admin.name, TOKEN)
        self.store.set_token("reader", Role.read.name, READER)
        self.service = PatchService(FakeClient(weights, RANKS), self.store)
        self.files = [make(weights, seed).data for seed in (1, 2, 3)]
        self.ids = [hashlib.sha256(data).hexdigest() for data in self.files]
        for data in self.files[:2]:
            self.service.upload(data, "owner")
        self.app = FastAPI()
        self.app.include_router(router())
        self.app.state.patcher = PluginState(self.store, self.service)


DESCRIBED = {
    "vllm": "0",
    "model": "m",
    "dtype": "bfloat16",
    "platform": "cpu",
    "world_size": RANKS,
    "eager": True,
}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_client, "describe", lambda client: DESCRIBED)
        yield Played(tmp_path_factory.mktemp("played"))


@pytest.fixture(scope="module")
def described(played: Played) -> Any:
    return schemathesis.openapi.from_asgi(f"{ROUTE}/openapi.json", played.app)


FILES = st.builds(
    lambda seed: mutations.mutate(
        Random(seed).choice(mutations.seeds()), Random(seed), mutations.noise(Random(seed))
    ),
    st.integers(0, 2**32),
)
schemathesis.openapi.media_type("application/octet-stream", FILES)


def with_what_is_known(case: Any, played: Played) -> None:
    """Now and then ids and versions of this engine, which no generator would find."""
    draw = Random(repr((case.body, case.headers, case.path_parameters)))
    if case.path_parameters and draw.random() < 0.3:
        case.path_parameters["patch_id"] = draw.choice(played.ids)
    if isinstance(case.body, dict) and draw.random() < 0.7:
        for name in ("stack", "patches"):
            if isinstance(case.body.get(name), list):
                case.body[name] = draw.sample(played.ids, draw.randrange(3))
    if case.headers and "If-Match" in case.headers and draw.random() < 0.7:
        case.headers["If-Match"] = f'"{played.store.in_force().version}"'


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_sends_what_the_document_allows_and_what_it_does_not(
    played: Played, described: Any, path: str, method: str, mode: GenerationMode
) -> None:
    if path == OPEN and mode is GenerationMode.NEGATIVE:
        return
    operation = described[path][method]

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            with_what_is_known(case, played)
        answer = case.call(headers={"Authorization": f"Bearer {TOKEN}"})
        case.validate_response(answer, checks=CHECKS)
        assert answer.status_code != 500, answer.text

    ask()


@pytest.fixture
def asked(played: Played) -> TestClient:
    return TestClient(played.app, headers={"Authorization": f"Bearer {TOKEN}"})


def refused(answer: Any, *codes: str) -> None:
    assert 400 <= answer.status_code < 500
    assert answer.headers["content-type"] == "application/problem+json"
    told = answer.json()
    assert told["code"] in codes
    assert told["detail"].isprintable(), "it may be read on a terminal, and goes into a log"
    assert len(answer.content) < 2000


BODIES = {
    "half a surrogate pair": b'{"stack":["\\ud800"]}',
    "bytes that are no text": b'{"stack":["\xff"]}',
    "a field that writes to a terminal": b'{"stack":[],"\\u001b[2J":1}',
    "a field as long as the body": b'{"' + b"k" * 500_000 + b'":1}',
    "many fields": b"{" + b",".join(b'"f%d":1' % n for n in range(20_000)) + b"}",
    "deep nesting": b'{"stack":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "many ids": b'{"stack":[' + b",".join(b'"%d"' % n for n in range(5_000)) + b"]}",
    "wrong ids": b'{"stack":[' + b"1," * 4_000 + b"1]}",
    "an endless life": b'{"stack":[],"ttl":1e400}',
    "no life": b'{"stack":[],"ttl":NaN}',
    "too much": b" " * (1 << 20) + b'{"stack":[]}',
    "nothing": b"",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_sends_a_body_that_no_document_allows(asked: TestClient, body: bytes) -> None:
    for method, path in (("PUT", "/stack"), ("POST", "/confirm")):
        answer = asked.request(method, ROUTE + path, content=body, headers={"If-Match": '"x"'})
        refused(answer, "usage")


def test_forges_a_line_of_the_log_by_an_id(
    asked: TestClient, played: Played, caplog: pytest.LogCaptureFixture
) -> None:
    forged = "x\noutcome=done"
    version = f'"{played.store.in_force().version}"'
    with caplog.at_level("INFO", logger="vllm.patcher"):
        answer = asked.put(
            f"{ROUTE}/stack", json={"stack": [forged]}, headers={"If-Match": version}
        )
    refused(answer, "unknown-patch")
    assert caplog.messages
    assert all("\n" not in message for message in caplog.messages)
    refused(asked.post(f"{ROUTE}/confirm", json={"patches": [forged]}), "unknown-patch")
    refused(asked.get(f"{ROUTE}/patches/%0aoutcome=done"), "unknown-patch")
    wanted = [] if played.store.in_force().ids else played.ids[:1]
    odd: Any = {"If-Match": b"\x1b[2J\xff"}
    refused(asked.put(f"{ROUTE}/stack", json={"stack": wanted}, headers=odd), "stack-changed")


@pytest.mark.parametrize("header", [b"", b"Bearer", b"Bearer \xff\xfe", b"Basic eDp5", b"Bearer x"])
def test_sends_no_token_that_is_one(played: Played, header: bytes) -> None:
    client = TestClient(played.app)
    for path, method in OPERATIONS:
        if path != OPEN:
            odd: Any = {"Authorization": header}
            refused(client.request(method, path, headers=odd), "not-permitted")


def test_reads_with_a_token_that_may_only_read(played: Played) -> None:
    client = TestClient(played.app, headers={"Authorization": f"Bearer {READER}"})
    for method, path in (("POST", "/patches"), ("PUT", "/stack"), ("POST", "/confirm")):
        refused(client.request(method, ROUTE + path, content=b"{}"), "role-too-weak")


def test_the_document_describes_every_route_and_wants_no_token(played: Played) -> None:
    told = TestClient(played.app).get(f"{ROUTE}/openapi.json").json()
    own = {route.path for route in router().routes if isinstance(route, APIRoute)}
    assert set(told["paths"]) == own - {f"{ROUTE}/openapi.json"}
    assert told["paths"] == {
        path: held for path, held in played.app.openapi()["paths"].items() if ROUTE in path
    }, "vLLM's own document has the same"
    for path, methods in told["paths"].items():
        for operation in methods.values():
            assert ("security" in operation) is (path != OPEN)
            assert set(operation["responses"]) >= ({"200"} if path == OPEN else {"200", "401"})
    json.dumps(told, allow_nan=False)
