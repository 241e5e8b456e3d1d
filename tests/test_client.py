"""The HTTP client against a real HTTP server, and what it makes of every wrong answer."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from patcher import errors
from patcher.client import Engine
from patcher.errors import (
    AlreadyAppliedError,
    AmbiguousIdError,
    EngineUnreachableError,
    InvalidPatchError,
    PatcherError,
    PermissionDeniedError,
    StackChangedError,
    UnknownPatchError,
    UsageError,
)
from patcher.given import resolve
from tests.fake_engine import TOKEN, FakeEngine, Reply, json_reply, problem, version_of
from tests.small_patch import DAMAGES, MODULE, small_patch

IDS = ["abcd1" + "0" * 59, "abcd2" + "0" * 59, "ffff0" + "0" * 59]


def subclasses(kind: type[PatcherError]) -> list[type[PatcherError]]:
    """All kinds of error that others may catch; the routes have one of their own beside them."""
    below = [one for one in kind.__subclasses__() if not one.__name__.startswith("_")]
    return [kind, *(found for one in below for found in subclasses(one))]


def test_apply_puts_patches_on_the_top_in_the_given_order(fake: FakeEngine) -> None:
    first, second, third = (small_patch(seed) for seed in range(3))
    with Engine(fake.url, TOKEN) as engine:
        engine.apply(first)
        change = engine.apply(second.data, third)
        assert change["stack"] == [first.id, second.id, third.id] == fake.stack
        assert change["weight_version"] == version_of(fake.stack)
        assert (change["seconds"], change["pause_ms"]) == (0.25, 31.5)


def test_apply_asks_for_one_change_with_what_it_is_based_on(
    fake: FakeEngine, patch_file: Path
) -> None:
    with Engine(fake.url, TOKEN) as engine:
        engine.apply(patch_file, small_patch(1), in_flight="drain", reason="request 17")
    changes = [request for request in fake.requests if request.method == "PUT"]
    assert len(changes) == 1
    assert changes[0].headers["If-Match"] == f'"{version_of([])}"'
    body = json.loads(changes[0].body)
    assert body == {"stack": fake.stack, "in_flight": "drain", "reason": "request 17"}


def test_apply_of_a_patch_in_force_changes_and_uploads_nothing(fake: FakeEngine) -> None:
    with Engine(fake.url, TOKEN) as engine:
        engine.apply(small_patch())
        fake.requests.clear()
        with pytest.raises(AlreadyAppliedError):
            engine.apply(small_patch(1), small_patch())
    assert [request.method for request in fake.requests] == ["GET"]


def test_apply_of_the_same_patch_twice_at_once_is_refused(fake: FakeEngine) -> None:
    with Engine(fake.url, TOKEN) as engine, pytest.raises(AlreadyAppliedError):
        engine.apply(small_patch(), small_patch())
    assert fake.stack == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_before_any_request(
    fake: FakeEngine, tmp_path: Path, damage: str
) -> None:
    make, code = DAMAGES[damage]
    path = tmp_path / "p.st"
    path.write_bytes(make(small_patch().data))
    with Engine(fake.url, TOKEN) as engine, pytest.raises(InvalidPatchError) as caught:
        engine.apply(small_patch(1), path)
    assert caught.value.code == code
    assert fake.requests == []


def test_a_change_by_somebody_else_meanwhile_is_an_error(fake: FakeEngine) -> None:
    with Engine(fake.url, TOKEN) as engine, pytest.raises(StackChangedError):
        engine.set_stack([], expect="0" * 64)


def test_revert_takes_out_of_the_middle_by_a_shortened_id(fake: FakeEngine) -> None:
    patches = [small_patch(seed) for seed in range(3)]
    with Engine(fake.url, TOKEN) as engine:
        engine.apply(*patches)
        change = engine.revert(patches[1].id[:8].upper())
    assert change["stack"] == [patches[0].id, patches[2].id]


def test_revert_of_all_gives_the_base_even_where_nothing_is_in_force(fake: FakeEngine) -> None:
    with Engine(fake.url, TOKEN) as engine:
        engine.apply(small_patch())
        assert engine.revert(all=True)["stack"] == []
        assert engine.revert(all=True)["stack"] == []


def test_revert_wants_ids_or_all_and_not_both(fake: FakeEngine) -> None:
    with Engine(fake.url, TOKEN) as engine:
        with pytest.raises(UsageError):
            engine.revert()
        with pytest.raises(UsageError):
            engine.revert("abcd", all=True)
    assert fake.requests == []


def test_ids_may_be_shortened_while_unambiguous() -> None:
    assert resolve(["abcd1", "FFFF", IDS[1]], IDS) == [IDS[0], IDS[2], IDS[1]]
    with pytest.raises(AmbiguousIdError) as caught:
        resolve(["abcd"], IDS)
    assert "abcd1" in str(caught.value)
    assert "abcd2" in str(caught.value)
    with pytest.raises(AmbiguousIdError):
        resolve(["a"], IDS)
    assert resolve(["f"], IDS) == [IDS[2]], "one digit will do"
    for unknown in ("0123", "wxyz", IDS[0] + "0"):
        with pytest.raises(UnknownPatchError):
            resolve([unknown], IDS)
    with pytest.raises(UsageError):
        resolve([" "], IDS)


def test_what_the_engine_holds_can_be_listed_and_fetched(fake: FakeEngine) -> None:
    patch = small_patch()
    with Engine(fake.url, TOKEN) as engine:
        assert engine.upload(patch)["modules"] == {MODULE: 2}
        assert [held["id"] for held in engine.patches()] == [patch.id]
        assert engine.download(patch.id) == patch
        assert fake.stack == []
        with pytest.raises(UnknownPatchError):
            engine.download("f" * 64)
        with pytest.raises(UsageError):
            engine.download("../status")


def test_the_ledger_and_verification_come_as_told(fake: FakeEngine) -> None:
    with Engine(fake.url, TOKEN) as engine:
        engine.apply(small_patch(), reason="one")
        engine.revert(all=True, reason="two")
        assert [one["seq"] for one in engine.ledger()] == [1, 2]
        assert [one["seq"] for one in engine.ledger(after=1)] == [2]
        fake.live_ok = False
        assert engine.verify()["ok"] is False


@pytest.mark.parametrize("kind", subclasses(PatcherError), ids=lambda kind: kind.code)
def test_every_error_of_the_protocol_is_raised_as_its_class(
    fake: FakeEngine, kind: type[PatcherError]
) -> None:
    fake.instead["GET", "status"] = problem(kind.code, kind.http_status, "the cause", "the cure")
    with Engine(fake.url, TOKEN) as engine, pytest.raises(PatcherError) as caught:
        engine.status()
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.cure) == ("the cause", "the cure")


def test_an_error_of_a_newer_engine_is_still_one_of_ours(fake: FakeEngine) -> None:
    fake.instead["GET", "status"] = problem("invented-later", 409, "the cause")
    with Engine(fake.url, TOKEN) as engine, pytest.raises(PatcherError, match="the cause"):
        engine.status()


def test_a_problem_is_known_by_its_type_where_it_has_no_code(fake: FakeEngine) -> None:
    document = {"type": "urn:patcher:error:stack-changed", "detail": "the cause", "stack": []}
    fake.instead["GET", "status"] = json_reply(document, 412)
    with Engine(fake.url, TOKEN) as engine, pytest.raises(StackChangedError) as caught:
        engine.status()
    assert caught.value.message == "the cause"
    assert caught.value.details == {"stack": []}


@pytest.mark.parametrize("status", [401, 403])
def test_any_refused_token_is_not_permitted(fake: FakeEngine, status: int) -> None:
    fake.instead["GET", "status"] = Reply(status, b"<html>no</html>", "text/html")
    with Engine(fake.url, TOKEN) as engine, pytest.raises(PermissionDeniedError):
        engine.status()


@pytest.mark.parametrize("token", [None, "wrong"])
def test_without_the_right_token_nothing_is_permitted(
    fake: FakeEngine, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PATCHER_TOKEN", raising=False)
    with Engine(fake.url, token) as engine, pytest.raises(PermissionDeniedError):
        engine.apply(small_patch())
    assert fake.stack == []
    assert fake.held == {}


@pytest.mark.parametrize(
    "reply",
    [
        Reply(404, b'{"detail":"Not Found"}'),
        Reply(404, b"<html>Not Found</html>", "text/html"),
    ],
    ids=["fastapi", "html"],
)
def test_an_engine_without_the_plugin_is_told_apart_from_no_engine(
    fake: FakeEngine, reply: Reply
) -> None:
    fake.instead["*", "*"] = reply
    with Engine(fake.url, TOKEN) as engine, pytest.raises(EngineUnreachableError) as caught:
        engine.status()
    assert "not loaded" in caught.value.message
    assert "VLLM_PLUGINS=patcher" in caught.value.cure


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, b"<html>welcome</html>", "text/html"),
        Reply(200, b"[]"),
        Reply(200, b"{}"),
        Reply(200, b"\xff\xfe\x00", "application/json"),
        Reply(302, b"", "text/html"),
        Reply(502, b"<html>bad gateway</html>", "text/html"),
        Reply(500, b"Internal Server Error", "text/plain"),
    ],
    ids=["html", "list", "no-fields", "not-utf8", "redirect", "bad-gateway", "plain-500"],
)
def test_an_answer_in_another_protocol_is_unreachable(fake: FakeEngine, reply: Reply) -> None:
    fake.instead["*", "*"] = reply
    with Engine(fake.url, TOKEN) as engine, pytest.raises(EngineUnreachableError):
        engine.status()


def test_no_engine_at_all_is_unreachable() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with Engine(url, TOKEN) as engine, pytest.raises(EngineUnreachableError, match="No answer"):
            engine.status()


def test_an_engine_that_takes_too_long_is_unreachable(fake: FakeEngine) -> None:
    fake.delay = 0.5
    late = pytest.raises(EngineUnreachableError, match="too long")
    with Engine(fake.url, TOKEN, timeout=0.1) as engine, late:
        engine.status()


def test_changes_may_take_longer_than_other_answers(fake: FakeEngine) -> None:
    fake.delay = 0.3
    with Engine(fake.url, TOKEN, timeout=0.1) as engine:
        assert engine.set_stack([], expect=version_of([]))["stack"] == []


def test_a_connection_lost_in_a_change_says_that_the_outcome_is_open() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(10)

        def hang_up() -> None:
            connection, _ = listening.accept()
            connection.recv(65536)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with Engine(url, TOKEN) as engine, pytest.raises(EngineUnreachableError) as caught:
            engine.set_stack([], expect="0" * 64)
        thread.join()
    assert "not known" in caught.value.cure


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "127.0.0.1",
        "ftp://engine",
        "http://",
        "http://engine:port",
        "http://engine:70000",
        "http://engine:8000/v1",
        "http://engine:8000/?a=b",
        "http://[::1",
        "http://engine\n",
    ],
)
def test_what_is_not_a_servers_root_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        Engine(url)


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        Engine("http://me:hunter2@engine")
    assert "hunter2" not in str(caught.value)


def test_url_and_token_come_from_the_environment(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHER_ENGINE", fake.url + "/")
    monkeypatch.setenv("PATCHER_TOKEN", TOKEN)
    with Engine() as engine:
        assert engine.status()["stack"] == []
    monkeypatch.delenv("PATCHER_ENGINE")
    with pytest.raises(UsageError, match="PATCHER_ENGINE"):
        Engine()


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with Engine(fake.url, TOKEN) as engine:
        assert engine.status()["stack"] == []


def test_the_token_is_in_no_repr_and_no_error(fake: FakeEngine) -> None:
    secret = "sesame-open-17"
    fake.instead["*", "*"] = Reply(500, b"x")
    with Engine(fake.url, secret) as engine:
        assert secret not in repr(engine)
        with pytest.raises(PatcherError) as caught:
            engine.status()
    told = [caught.value]
    with pytest.raises(UsageError) as refused:
        Engine(fake.url, f"{secret}\nHost: elsewhere")
    told.append(refused.value)
    for error in told:
        assert secret not in repr(error) + str(error)


def test_every_error_has_its_own_exit_code_or_its_parents() -> None:
    wanted = {
        "internal": 1, "usage": 2, "invalid-patch": 3, "format-version": 3, "base-mismatch": 4,
        "not-trusted": 5, "stack-conflict": 6, "unknown-patch": 6, "ambiguous-id": 6,
        "already-applied": 6, "stack-changed": 6, "stack-raced": 6, "engine-unreachable": 7,
        "engine-refused": 8,
        "verification-failed": 9, "not-permitted": 10, "role-too-weak": 10, "bad-input": 11,
        "bad-forget-set": 11, "bad-model": 11, "not-finite": 11, "not-enough-memory": 11,
        "bars-not-met": 12, "guard-breached": 13, "not-shipped": 14,
    }  # fmt: skip
    assert {kind.code: kind.exit_code for kind in subclasses(PatcherError)} == wanted
    assert all(errors.by_code(code).exit_code == wanted[code] for code in wanted)
