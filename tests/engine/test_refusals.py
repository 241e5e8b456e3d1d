"""What must be refused is: by the command, against a real engine, which stays as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from patcher.client import Engine
from patcher.patch import Patch
from tests.engine.patches import module_name, random_patch, weights
from tests.engine.server import REPOSITORY, Server, free_port

pytestmark = [pytest.mark.engine, pytest.mark.model]
Run = Callable[..., tuple[int, Any]]


def patcher(*arguments: str, token: str = "", url: str = "") -> tuple[int, Any]:
    """The command as a user runs it: its exit code and its JSON document."""
    environment = {"PATH": "/usr/bin:/bin", "PATCHER_ENGINE": url, "PATCHER_TOKEN": token}
    done = subprocess.run(
        [sys.executable, "-m", "patcher", *arguments, "--json"],
        capture_output=True,
        cwd=REPOSITORY,
        env={name: value for name, value in environment.items() if value},
        timeout=120,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def run(server: Server, engine: Engine, patch_a: Patch) -> Iterator[Run]:
    """The command against an engine with patch A in force, which must be so afterwards."""
    engine.apply(patch_a)
    before = engine.status()
    digests = engine.verify()

    def call(*arguments: str, token: str | None = None) -> tuple[int, Any]:
        given = server.token if token is None else token
        return patcher(*arguments, token=given, url=server.url)

    yield call
    assert engine.status() == before
    after = engine.verify()
    assert after["ok"]
    held = after["ranks"][0]["modules"]
    assert digests["ranks"][0]["modules"].items() <= held.items()


def written(patch: Patch, path: Path) -> str:
    path.write_bytes(patch.data)
    return str(path)


def test_the_happy_path_first(
    server: Server, engine: Engine, patch_a: Patch, tmp_path: Path
) -> None:
    """The commands' JSON, so that the refusals below are refusals of something that works."""
    path = written(patch_a, tmp_path / "a.st")
    code, change = patcher("apply", path, token=server.token, url=server.url)
    assert code == 0
    assert change["stack"] == [patch_a.id]
    assert {"weight_version", "seconds", "pause_ms"} <= change.keys()
    code, status = patcher("status", token=server.token, url=server.url)
    assert code == 0
    assert {"engine", "base", "stack", "weight_version"} <= status.keys()
    code, verdict = patcher("verify", token=server.token, url=server.url)
    assert code == 0
    assert verdict["ok"]
    assert set(verdict["modules"]) >= set(patch_a.deltas)
    code, change = patcher("revert", patch_a.id[:8], token=server.token, url=server.url)
    assert code == 0
    assert change["stack"] == []


def test_a_patch_for_another_base(run: Run, real_model: Path, tmp_path: Path) -> None:
    other = {n: w + torch.ones_like(w) * 0.01 for n, w in weights(real_model).items()}
    path = written(random_patch(real_model, 9, base=other), tmp_path / "other.st")
    code, problem = run("apply", path)
    assert code == 4
    assert problem["error"]["code"] == "base-mismatch"


def test_a_patch_for_another_architecture(run: Run, tmp_path: Path) -> None:
    weight = torch.randn(64, 128).bfloat16()
    base = {f"{module_name(77)}.weight": weight}
    path = written(random_patch(Path(), 9, layers=(77,), base=base), tmp_path / "other.st")
    code, problem = run("apply", path)
    assert code == 4
    assert "layers.77" in problem["error"]["message"]


def test_a_patch_for_another_dtype(run: Run, real_model: Path, tmp_path: Path) -> None:
    other = {n: w.to(torch.float16) for n, w in weights(real_model).items()}
    path = written(random_patch(real_model, 9, base=other), tmp_path / "half.st")
    code, problem = run("apply", path)
    assert code == 4
    assert "bfloat16" in problem["error"]["message"]
    assert "float16" in problem["error"]["message"]


def test_a_patch_that_blows_a_weight_up(run: Run, real_model: Path, tmp_path: Path) -> None:
    # Not through `written`: no honest writer makes it.
    data = bytearray(random_patch(real_model, 9, layers=(3,)).data)
    data[-4:] = b"\x00\x00\x80\x7e"  # 2^126, the last value of R
    path = tmp_path / "huge.st"
    path.write_bytes(data)
    code, problem = run("apply", path)
    assert code == 3
    assert "blow the weight up" in problem["error"]["message"]


def test_a_stack_that_overflows(run: Run, real_model: Path, tmp_path: Path) -> None:
    # Each within its bound; the same direction two dozen times over is beyond bfloat16.
    paths = [
        written(
            random_patch(real_model, 11, layers=(3,), scale=900.0, title=f"edit {number}"),
            tmp_path / f"{number}.st",
        )
        for number in range(26)
    ]
    code, problem = run("apply", *paths)
    assert code == 8
    assert "finite" in problem["error"]["message"]


def test_a_truncated_file(run: Run, patch_b: Patch, tmp_path: Path) -> None:
    path = tmp_path / "cut.st"
    path.write_bytes(patch_b.data[: len(patch_b.data) // 2])
    code, problem = run("apply", str(path))
    assert code == 3
    assert problem["error"]["code"] == "invalid-patch"


@pytest.mark.parametrize("where", ["client", "server"])
def test_nan_inside(run: Run, server: Server, patch_b: Patch, tmp_path: Path, where: str) -> None:
    poisoned = patch_b.data[:-4] + b"\xff\xff\xff\x7f"
    if where == "client":
        path = tmp_path / "nan.st"
        path.write_bytes(poisoned)
        assert run("apply", str(path))[0] == 3
    else:
        answer = _post(server, poisoned)
        assert answer.status_code == 422
        assert answer.json()["code"] == "invalid-patch"


def test_another_format_version(run: Run, server: Server, patch_b: Patch, tmp_path: Path) -> None:
    future = patch_b.data.replace(b'\\"format\\":1', b'\\"format\\":7')
    assert future != patch_b.data
    path = tmp_path / "future.st"
    path.write_bytes(future)
    code, problem = run("apply", str(path))
    assert code == 3
    assert problem["error"]["code"] == "format-version"
    assert _post(server, future).json()["code"] == "format-version"


@pytest.mark.parametrize("token", ["", "not-the-token-of-this-engine"])
def test_a_missing_or_wrong_token(run: Run, patch_b: Patch, tmp_path: Path, token: str) -> None:
    code, problem = run("apply", written(patch_b, tmp_path / "b.st"), token=token)
    assert code == 10
    assert problem["error"]["code"] == "not-permitted"


@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("GET", "status"),
        ("POST", "patches"),
        ("GET", "patches"),
        ("GET", "patches/0000"),
        ("PUT", "stack"),
        ("POST", "verify"),
        ("GET", "ledger"),
    ],
)
def test_no_route_opens_without_a_token(run: Run, server: Server, method: str, route: str) -> None:
    answer = httpx.request(method, f"{server.url}/plugins/patcher/v1/{route}", timeout=30)
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"


def test_no_engine(patch_b: Patch, tmp_path: Path) -> None:
    path = written(patch_b, tmp_path / "b.st")
    code, problem = patcher("apply", path, token="x" * 20, url=f"http://127.0.0.1:{free_port()}")
    assert code == 7
    assert problem["error"]["code"] == "engine-unreachable"


def test_an_unknown_id(run: Run) -> None:
    code, problem = run("revert", "feedface")
    assert code == 6
    assert problem["error"]["code"] == "unknown-patch"


def test_the_same_patch_twice(run: Run, patch_a: Patch, tmp_path: Path) -> None:
    code, problem = run("apply", written(patch_a, tmp_path / "a.st"))
    assert code == 6
    assert problem["error"]["code"] == "already-applied"


def test_what_a_patch_requires_and_conflicts_with(
    run: Run, real_model: Path, patch_a: Patch, tmp_path: Path
) -> None:
    lonely = random_patch(real_model, 11, requires=["ab" * 32])
    code, problem = run("apply", written(lonely, tmp_path / "lonely.st"))
    assert code == 6
    assert "requires" in problem["error"]["message"]
    hostile = random_patch(real_model, 12, conflicts=[patch_a.id])
    code, problem = run("apply", written(hostile, tmp_path / "hostile.st"))
    assert code == 6
    assert "conflicts" in problem["error"]["message"]


def test_a_change_that_somebody_else_overtook(run: Run, server: Server, patch_b: Patch) -> None:
    _post(server, patch_b.data)
    answer = _put(server, {"stack": [patch_b.id]}, {"If-Match": f'"{"0" * 64}"'})
    assert answer.status_code == 412
    with Engine(server.url, server.token) as engine:
        assert answer.json()["stack"] == engine.status()["stack"]
    assert _put(server, {"stack": [patch_b.id]}, {}).status_code == 428


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"stack": "x"}', b'{"stack": [], "in_flight": "never"}', b"\xff" * 9],
)
def test_a_malformed_body(run: Run, server: Server, body: bytes) -> None:
    answer = httpx.put(
        f"{server.url}/plugins/patcher/v1/stack",
        content=body,
        headers={"Authorization": f"Bearer {server.token}", "If-Match": "x"},
        timeout=30,
    )
    assert answer.status_code == 400
    assert answer.json()["code"] == "usage"


def test_the_log_never_holds_the_token(run: Run, server: Server) -> None:
    assert server.token not in server.log()
    assert str(server.token_file) in server.log(), "but where it lies is printed"


def _post(server: Server, data: bytes) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.token}"}
    return httpx.post(f"{server.url}/plugins/patcher/v1/patches", content=data, headers=headers)


def _put(server: Server, body: object, headers: dict[str, str]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.token}", **headers}
    return httpx.put(f"{server.url}/plugins/patcher/v1/stack", json=body, headers=headers)
