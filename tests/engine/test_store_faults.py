"""A disk that is full, a folder that can't be written, a database that is locked or damaged."""

from __future__ import annotations

import os
import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.torture import broken
from patcher.engine import store as store_module
from patcher.engine.stack import Stack
from patcher.engine.store import Store
from patcher.errors import EngineRefusedError, PatcherError
from patcher.patch import Patch
from tests.small_patch import small_patch

NOBODY = 65534


@pytest.fixture
def kept(tmp_path: Path) -> Store:
    """A store with one patch in force and one that is only held."""
    store = Store(tmp_path / "state")
    for seed in (1, 2):
        store.add_patch(small_patch(seed), "me")
    store.commit(Stack((small_patch(1).id,)), "change-done", {})
    return store


def is_whole(folder: Path) -> bool:
    """Whether all of ``kept`` is still there."""
    store = Store(folder)
    assert broken(store.ledger()) == []  # type: ignore[arg-type]
    held = [Patch.from_bytes(store.patch_bytes(small_patch(seed).id)) for seed in (1, 2)]
    return store.in_force().ids == (small_patch(1).id,) and held == [small_patch(1), small_patch(2)]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size`` bytes: what a full disk does to it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.add_patch(small_patch(3), "me"),
        lambda store: store.commit(Stack((small_patch(2).id,)), "change-done", {}),
        lambda store: store.record("change-intent", {}),
    ],
    ids=["patch", "commit", "record"],
)
def test_on_a_full_disk_nothing_is_half_written(
    kept: Store, write: Callable[[Store], object]
) -> None:
    with largest_file(512), pytest.raises(EngineRefusedError) as caught:
        write(kept)
    assert str(kept.folder) in caught.value.message
    assert "disk" in caught.value.cure
    assert is_whole(kept.folder)
    write(kept)  # and goes on where there is room again


def test_a_folder_that_only_root_may_write_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    folder = tmp_path / "state"
    Store(folder)
    for path in [tmp_path, folder]:
        path.chmod(0o755)
    assert "can't be used" in as_nobody(lambda: Store(folder))
    assert "can't be used" in as_nobody(lambda: Store(tmp_path / "another"))
    Store(folder)


def as_nobody(work: Callable[[], object]) -> str:
    """The error that ``work`` raises in a process of the user nobody."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(NOBODY)
            work()
        except PatcherError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


def test_what_another_user_owns_is_refused(kept: Store) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    for path in (kept.folder, kept.path):
        os.chown(path, NOBODY, -1)
        with pytest.raises(EngineRefusedError, match=f"belongs to another user .uid {NOBODY}."):
            Store(kept.folder)
        os.chown(path, 0, -1)
    assert is_whole(kept.folder)


def test_what_everybody_can_write_is_refused(kept: Store) -> None:
    for path in (kept.folder, kept.path):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        with pytest.raises(EngineRefusedError, match="written by everybody"):
            Store(kept.folder)
        path.chmod(mode)
    assert is_whole(kept.folder)


def test_a_database_that_somebody_locked(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BUSY_PATIENCE", 0.05)
    other = sqlite3.connect(kept.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(EngineRefusedError, match="locked"):
        kept.record("change-intent", {})
    other.execute("ROLLBACK")
    other.close()
    assert is_whole(kept.folder)


@pytest.mark.parametrize("damage", [b"", b"not a database " * 100], ids=["empty", "garbage"])
def test_a_damaged_database_is_refused_and_left_as_it_is(kept: Store, damage: bytes) -> None:
    for extra in kept.folder.glob("patcher.sqlite3-*"):
        extra.unlink()
    kept.path.write_bytes(damage or kept.path.read_bytes()[: 4096 + 100])
    found = kept.path.read_bytes()
    with pytest.raises(EngineRefusedError, match="can't be used"):
        Store(kept.folder).ledger()
    assert kept.path.read_bytes() == found


def test_a_clock_that_jumps_back_changes_no_order(
    kept: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "now", lambda: "1999-12-31T23:59:59.999Z")
    kept.record("change-intent", {"change": "x"})
    kept.commit(Stack((small_patch(1).id, small_patch(2).id)), "change-done", {"change": "x"})
    entries = kept.ledger()
    assert [entry["seq"] for entry in entries] == sorted(entry["seq"] for entry in entries)
    assert broken(entries) == []  # type: ignore[arg-type]
    assert entries[-1]["event"] == "change-done"
    assert kept.interrupted() is None
    assert kept.committed().ids == (small_patch(1).id, small_patch(2).id)
