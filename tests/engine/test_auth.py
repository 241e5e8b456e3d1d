"""Tokens: made once, kept as hashes, refused when they don't fit."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from patcher.engine.auth import Role, authorise, ensure_token, issue, withdraw
from patcher.engine.store import Store
from patcher.errors import (
    EngineRefusedError,
    PermissionDeniedError,
    RoleTooWeakError,
    UsageError,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


def test_first_start_makes_a_token_that_only_the_owner_reads(store: Store) -> None:
    path = store.folder / "token"
    assert ensure_token(store, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = path.read_text().strip()
    assert authorise(store, f"Bearer {token}", Role.admin) == "admin"
    assert not ensure_token(store, path), "the second start keeps it"
    assert path.read_text().strip() == token


def test_the_database_never_holds_the_token(store: Store) -> None:
    ensure_token(store, store.folder / "token")
    token = (store.folder / "token").read_text().strip().encode()
    held = b"".join(p.read_bytes() for p in store.folder.iterdir() if p.name != "token")
    assert token not in held


def test_another_token_in_the_file_ends_the_old_one(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("first-token-of-mine\n")
    path.chmod(0o600)
    ensure_token(store, path)
    path.write_text("second-token-of-mine\n")
    ensure_token(store, path)
    assert authorise(store, "Bearer second-token-of-mine", Role.admin)
    with pytest.raises(PermissionDeniedError):
        authorise(store, "Bearer first-token-of-mine", Role.read)


@pytest.mark.parametrize("content", ["", "\n", "short", "ünïcödé-token-of-mine"])
def test_an_unusable_token_file_stops_the_start(store: Store, tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(EngineRefusedError):
        ensure_token(store, path)


def test_a_token_file_that_everybody_can_read_stops_the_start(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("a-token-in-the-open\n")
    path.chmod(0o644)
    with pytest.raises(EngineRefusedError, match="chmod 600"):
        ensure_token(store, path)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic YWRtaW46", "Bearer nobody-has-this-token"]
)
def test_nobody_passes_without_a_known_token(store: Store, header: str | None) -> None:
    ensure_token(store, store.folder / "token")
    with pytest.raises(PermissionDeniedError) as caught:
        authorise(store, header, Role.read)
    assert "nobody-has-this-token" not in str(caught.value), "a token is never repeated"


def test_a_reader_may_not_change(store: Store) -> None:
    store.set_token("watcher", Role.read.name, "token-that-only-reads")
    assert authorise(store, "Bearer token-that-only-reads", Role.read) == "watcher"
    with pytest.raises(RoleTooWeakError, match="read"):
        authorise(store, "Bearer token-that-only-reads", Role.apply)


def test_a_token_of_ones_own_may_what_its_role_may(store: Store) -> None:
    first = issue(store, "grafana", "read")
    assert authorise(store, f"Bearer {first}", Role.read) == "grafana"
    with pytest.raises(RoleTooWeakError, match="--role apply") as caught:
        authorise(store, f"Bearer {first}", Role.apply)
    assert first not in str(caught.value)
    second = issue(store, "grafana", "apply")
    assert authorise(store, f"Bearer {second}", Role.apply) == "grafana"
    with pytest.raises(PermissionDeniedError):
        authorise(store, f"Bearer {first}", Role.read)
    withdraw(store, "grafana")
    with pytest.raises(PermissionDeniedError):
        authorise(store, f"Bearer {second}", Role.read)
    told = [(e["event"], e["detail"]) for e in store.ledger()]
    assert told == [
        ("token-set", {"name": "grafana", "role": "read"}),
        ("token-set", {"name": "grafana", "role": "apply"}),
        ("token-removed", {"name": "grafana"}),
    ]


@pytest.mark.parametrize("name", ["admin", "ttl", "", "a b", "x" * 65, "a\nb"])
def test_names_that_mean_something_else_are_refused(store: Store, name: str) -> None:
    ensure_token(store, store.folder / "token")
    for asked in (lambda: issue(store, name, "read"), lambda: withdraw(store, name)):
        with pytest.raises(UsageError):
            asked()
    token = (store.folder / "token").read_text().strip()
    assert authorise(store, f"Bearer {token}", Role.admin) == "admin"
