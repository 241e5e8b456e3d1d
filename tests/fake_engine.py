"""A small real HTTP server that speaks the engine's protocol, holding its state in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from patcher.ledger import GENESIS, chain, detail_text
from patcher.patch import Patch

ROUTE = "/plugins/patcher/v1/"
TOKEN = "fake-admin-token-of-the-tests"


class Request(NamedTuple):
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class Reply(NamedTuple):
    status: int
    body: bytes
    kind: str = "application/json"


def json_reply(document: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(document).encode())


def problem(code: str, status: int, detail: str, cure: str = "") -> Reply:
    document = {
        "type": f"urn:patcher:error:{code}",
        "title": code,
        "status": status,
        "detail": detail,
        "cure": cure,
        "code": code,
    }
    return Reply(status, json.dumps(document).encode(), "application/problem+json")


def version_of(stack: list[str]) -> str:
    return hashlib.sha256("".join(f"{one}\n" for one in stack).encode()).hexdigest()


class FakeEngine:
    """Its state, every request that it got, and replies that stand in for the right ones."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.held: dict[str, bytes] = {}
        self.entries: list[dict[str, Any]] = []
        self.expires: dict[str, str] = {}
        self.requests: list[Request] = []
        self.instead: dict[tuple[str, str], Reply] = {}
        self.delay = 0.0  # seconds before each answer
        self.live_ok = True
        self.plugin: str | None = "0.1.0"
        self.world_size = 1
        self.state = "ready"
        self.overlaid: list[str] = []
        self.signatures: list[tuple[str, bytes]] = []
        self.url = ""

    def answer(self, request: Request) -> Reply:
        path = request.path.partition("?")[0].removeprefix(ROUTE)
        instead = self.instead.get((request.method, path)) or self.instead.get(("*", "*"))
        if instead:
            return instead
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return problem("not-permitted", 401, "This needs patcher's token.", "Give it.")
        name = f"{request.method.lower()}_{path.partition('/')[0]}"
        reply: Reply = getattr(self, name)(request)
        return reply

    def record(self, event: str, detail: dict[str, Any]) -> None:
        """Append to the ledger; entry n is of minute n."""
        seq = len(self.entries) + 1
        time = f"2026-11-24T{3 + seq // 60:02}:{seq % 60:02}:00.000Z"
        previous = self.entries[-1]["hash"] if self.entries else GENESIS
        digest = chain(previous, seq, time, event, detail_text(detail))
        entry = {"seq": seq, "time": time, "event": event, "detail": detail}
        self.entries.append({**entry, "previous": previous, "hash": digest})

    def get_status(self, request: Request) -> Reply:
        modules: dict[str, list[str]] = {}
        for one in self.stack:
            for name in self._patch(one).deltas:
                modules.setdefault(name, []).append(one)
        engine = {"vllm": "0.32.0", "patcher": "0.1.0", "model": "m", "platform": "cpu"}
        return json_reply(
            {
                "engine": {**engine, "world_size": self.world_size, "state": self.state},
                "base": dict.fromkeys(modules, "0" * 64),
                "stack": self.stack,
                "weight_version": version_of(self.stack),
                "patches": [self._in_force(one) for one in self.stack],
                "modules": modules,
                "trust": None,
                "overlaid": self.overlaid,
                "processes": [{"engine": 0, "rank": 0, "pid": 4711, "plugin": self.plugin}],
            }
        )

    def post_patches(self, request: Request) -> Reply:
        if request.path.endswith("/signatures"):
            patch_id = request.path.split("/")[-2]
            self.signatures.append((patch_id, request.body))
            return json_reply({"patch": patch_id, "signer": None}, 201)
        patch = Patch.from_bytes(request.body)
        status = 200 if patch.id in self.held else 201
        self.held[patch.id] = request.body
        ranks = {name: delta.rank for name, delta in patch.deltas.items()}
        return json_reply({"id": patch.id, "bytes": len(request.body), "modules": ranks}, status)

    def get_patches(self, request: Request) -> Reply:
        wanted = request.path.removeprefix(ROUTE).partition("/")[2]
        if wanted in self.held:
            return Reply(200, self.held[wanted], "application/octet-stream")
        if wanted:
            return problem("unknown-patch", 404, "No such patch.")
        listed = [{"id": i, "title": "", "bytes": len(b)} for i, b in self.held.items()]
        return json_reply({"patches": listed})

    def put_stack(self, request: Request) -> Reply:
        if request.headers.get("If-Match") != f'"{version_of(self.stack)}"':
            return problem("stack-changed", 412, "Somebody else changed the stack.")
        body = json.loads(request.body)
        told = {"before": self.stack, "after": body["stack"], "reason": body["reason"]}
        self.record("change-done", {**told, "actor": "admin", "change": "c0ffee"})
        if "ttl" in body:
            added = [one for one in body["stack"] if one not in self.stack]
            self.expires |= dict.fromkeys(added, "2026-11-24T05:00:00.000Z")
        self.stack = body["stack"]
        version = version_of(self.stack)
        change: dict[str, Any] = {"stack": self.stack, "weight_version": version}
        if "guards" in body:
            change["guards"] = [{"guard": g["name"], "ok": True} for g in body["guards"]]
        return json_reply({"change": "c0ffee", **change, "seconds": 0.25, "pause_ms": 31.5})

    def post_plan(self, request: Request) -> Reply:
        body = json.loads(request.body)
        new = [Patch.from_bytes(base64.b64decode(one)) for one in body["patches"]]
        doubled = [p.id for p in new if p.id in self.stack]
        refusals = [
            {
                "code": "already-applied",
                "message": f"{i[:12]} is there.",
                "cure": "",
                "exit_code": 6,
            }
            for i in doubled
        ]
        stack = [*self.stack, *(p.id for p in new)]
        return json_reply(
            {
                "ok": not refusals,
                "stack": stack,
                "weight_version": version_of(stack),
                "refusals": refusals,
                "questions": ["Is this meant?"],
                "signers": {},
                "modules": {n: {"patches": [p.id], "bytes": 384} for p in new for n in p.deltas},
                "staged_bytes": 384,
                "base_bytes": 0,
                "pause_ms": None,
                "seconds": 0.1,
            }
        )

    def post_confirm(self, request: Request) -> Reply:
        wanted = json.loads(request.body)["patches"]
        confirmed = [i for i in self.stack if i in (wanted or self.stack) and i in self.expires]
        for one in confirmed:
            del self.expires[one]
        return json_reply({"confirmed": confirmed})

    def post_verify(self, request: Request) -> Reply:
        modules = {name: self.live_ok for one in self.stack for name in self._patch(one).deltas}
        live = {name: {"ok": ok, "digest": "1" * 64} for name, ok in modules.items()}
        rank = {"engine": 0, "rank": 0, "stack": self.stack, "modules": live}
        told = {"ok": self.live_ok, "modules": modules, "ranks": [rank]}
        return json_reply({**told, "weight_version": version_of(self.stack)})

    def post_heal(self, request: Request) -> Reply:
        self.live_ok = True
        return self.post_verify(request)

    def get_ledger(self, request: Request) -> Reply:
        after = int(request.path.partition("after=")[2] or 0)
        return json_reply({"entries": [one for one in self.entries if one["seq"] > after]})

    def _patch(self, patch_id: str) -> Patch:
        return Patch.from_bytes(self.held[patch_id])

    def _in_force(self, patch_id: str) -> dict[str, Any]:
        patch = self._patch(patch_id)
        when = "2026-11-24T03:00:00.000Z"
        modules = {name: delta.rank for name, delta in patch.deltas.items()}
        told = {"id": patch_id, "title": patch.manifest.title, "since": when, "modules": modules}
        return {**told, "expires": self.expires.get(patch_id)}


@contextmanager
def serving() -> Iterator[FakeEngine]:
    """A fake engine on a free port of this machine, until the block ends."""
    fake = FakeEngine()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = Request(self.command, self.path, dict(self.headers), body)
            fake.requests.append(request)
            time.sleep(fake.delay)
            reply = fake.answer(request)
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.kind)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

        do_GET = do_POST = do_PUT = _serve  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that went away is what some tests are about

    server = Server(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
