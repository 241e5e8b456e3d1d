"""As much of the Hugging Face Hub as a push and a pull ask for, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.shipping.serving import Answering, running

REPO = "team/patches"
_API = re.compile(
    rf"/api/(models|datasets)/{REPO}/?(revision|tree|preupload|commit)?/?([^/]*)/?(.*)"
)
_FILE = re.compile(rf"(?:/datasets)?/{REPO}/resolve/([^/]+)/(.+)")


class FakeHub(ThreadingHTTPServer):
    """``commits``: revision to files. ``lfs``: whether files go by LFS, or in the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token: str | None = None
        self.lfs = False
        self.large: dict[str, bytes] = {}
        self.commits: dict[str, dict[str, bytes]] = {"0" * 40: {}}
        self.branches = {"main": "0" * 40}
        self.lie: Callable[[_Handler], bool] = lambda _: False

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))


@contextmanager
def hub_in_memory() -> Iterator[FakeHub]:
    with running(FakeHub()) as server:
        yield server


class _Handler(Answering):
    server: FakeHub

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        token = self.server.token
        if path.startswith("/upload/"):  # such an address is a secret by itself
            self.server.large[hashlib.sha256(body).hexdigest()] = body
            self.answer(200)
        elif token is not None and self.headers.get("Authorization") != f"Bearer {token}":
            self.answer(401, b"{}")
        elif self.server.lie(self):
            pass
        elif found := _FILE.fullmatch(path):
            self._or_404((self.server.files(found[1]) or {}).get(found[2]))
        elif found := _API.fullmatch(path):
            getattr(self, f"_{found[2] or 'revision'}")(found[3] or "main", found[4], body)
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        else:
            self.answer(404)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _or_404(self, data: bytes | None) -> None:
        if data is None:
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            self.answer(200, data)

    def _revision(self, revision: str, _: str, __: bytes) -> None:
        if self.server.files(revision) is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
        else:
            sha = self.server.branches.get(revision, revision)
            self._json({"id": REPO, "sha": sha, "private": True, "tags": [], "siblings": []})

    def _tree(self, revision: str, folder: str, __: bytes) -> None:
        prefix = f"{folder}/" if folder else ""
        self._json([
            {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
            for name, data in (self.server.files(revision) or {}).items()
            if name.startswith(prefix) and "/" not in name[len(prefix) :]
        ])  # fmt: skip

    def _preupload(self, _: str, __: str, body: bytes) -> None:
        mode = "lfs" if self.server.lfs else "regular"
        files = json.loads(body)["files"]
        told = [{"path": f["path"], "uploadMode": mode, "shouldIgnore": False} for f in files]
        self._json({"files": told})

    def _batch(self, asked: dict[str, Any]) -> None:
        self._json({"transfer": "basic", "objects": [
            {**one, "actions": {"upload": {"href": f"{self.server.url}/upload/{one['oid']}"}}}
            for one in asked["objects"]
        ]})  # fmt: skip

    def _commit(self, revision: str, _: str, body: bytes) -> None:
        files = dict(self.server.files(revision) or {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        commit = hashlib.sha1(body).hexdigest()
        self.server.commits[commit] = files
        self.server.branches[revision] = commit
        url = f"{self.server.url}/{REPO}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url})
