"""The durable state: what it holds survives, and what it says can be proven."""

from __future__ import annotations

import fcntl
import multiprocessing
import sqlite3
import stat
import threading
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TextIO

import pytest
import torch

from patcher.engine.stack import Stack
from patcher.engine.store import Store
from patcher.errors import EngineRefusedError, StackConflictError, UnknownPatchError
from patcher.ledger import GENESIS, chain
from patcher.patch import Patch
from tests.engine.patches import module_name, random_patch


@pytest.fixture
def patches() -> list[Patch]:
    base = {f"{module_name(0)}.weight": torch.randn(8, 12)}
    return [random_patch(Path(), seed, layers=(0,), rank=2, base=base) for seed in range(3)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


def test_only_the_owner_reads_the_state(store: Store) -> None:
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_what_was_committed_is_there_for_the_next_process(
    store: Store, patches: list[Patch]
) -> None:
    assert store.add_patch(patches[0], "me")
    assert not store.add_patch(patches[0], "me"), "again is fine, and changes nothing"
    store.commit(Stack((patches[0].id,)), "change-done", {})
    other = Store(store.folder)
    assert other.committed() == Stack((patches[0].id,))
    assert other.patch_bytes(patches[0].id) == patches[0].data
    assert other.manifests()[patches[0].id] == patches[0].manifest


def test_since_is_kept_for_what_stays_in_force(store: Store, patches: list[Patch]) -> None:
    for patch in patches:
        store.add_patch(patch, "me")
    store.commit(Stack((patches[0].id,)), "change-done", {})
    since = dict(store.since())
    store.commit(Stack((patches[1].id, patches[0].id)), "change-done", {})
    assert dict(store.since())[patches[0].id] == since[patches[0].id]
    assert [i for i, _ in store.since()] == [patches[1].id, patches[0].id]


def test_a_stack_of_unknown_patches_is_not_committed(store: Store, patches: list[Patch]) -> None:
    store.add_patch(patches[0], "me")
    store.commit(Stack((patches[0].id,)), "change-done", {})
    entries = len(store.ledger())
    with pytest.raises(EngineRefusedError, match="FOREIGN KEY"):
        store.commit(Stack(("ab" * 32,)), "change-done", {})
    assert store.committed() == Stack((patches[0].id,))
    assert len(store.ledger()) == entries, "neither stack nor ledger: one transaction"


def test_suspended_means_not_in_force_but_held(store: Store, patches: list[Patch]) -> None:
    store.add_patch(patches[0], "me")
    store.commit(Stack((patches[0].id,)), "change-done", {})
    store.suspend(True, "start-without-restore", {})
    assert store.in_force() == Stack()
    assert store.committed() == Stack((patches[0].id,))
    store.suspend(False, "start", {})
    assert store.in_force() == Stack((patches[0].id,))


def test_a_change_ends_the_suspension(store: Store, patches: list[Patch]) -> None:
    store.add_patch(patches[0], "me")
    store.suspend(True, "start-without-restore", {})
    store.commit(Stack((patches[0].id,)), "change-done", {})
    assert store.in_force() == Stack((patches[0].id,))


def test_an_unknown_patch(store: Store) -> None:
    with pytest.raises(UnknownPatchError):
        store.patch_bytes("ab" * 32)


def test_damaged_bytes_in_the_database_are_noticed(store: Store, patches: list[Patch]) -> None:
    store.add_patch(patches[0], "me")
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE patches SET data = ?", (patches[1].data,))
    with pytest.raises(EngineRefusedError, match="damaged"):
        Store(store.folder).patch_bytes(patches[0].id)


def test_each_ledger_entry_carries_the_hash_of_the_one_before(store: Store) -> None:
    for number in range(4):
        store.record("noted", {"number": number})
    previous = GENESIS
    with sqlite3.connect(store.path) as db:
        rows = db.execute("SELECT seq, time, event, detail, previous, hash FROM ledger").fetchall()
    for place, (seq, moment, event, detail, before, digest) in enumerate(rows, 1):
        assert (seq, before) == (place, previous)
        assert digest == chain(previous, seq, moment, event, detail)
        previous = digest
    assert [e["detail"]["number"] for e in store.ledger(after=2)] == [2, 3]


def test_an_intent_without_outcome_is_an_interruption(store: Store) -> None:
    assert store.interrupted() is None
    store.record("change-intent", {"change": "x"})
    assert store.interrupted() == {"change": "x"}
    store.record("change-interrupted", {"change": "x"})
    assert store.interrupted() is None


def test_another_schema_is_refused(store: Store) -> None:
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    with pytest.raises(EngineRefusedError, match="schema 99"):
        Store(store.folder)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineRefusedError, match="can't be used"):
        Store(tmp_path / "file" / "state")


def test_modules_are_known_once_a_patch_of_theirs_was_committed(
    store: Store, patches: list[Patch]
) -> None:
    store.add_patch(patches[0], "me")
    assert store.known_modules() == [], "a patch that was only uploaded tells nothing"
    store.commit(Stack((patches[0].id,)), "change-done", {})
    store.commit(Stack(), "change-done", {})
    name, module = next(iter(patches[0].manifest.base.modules.items()))
    assert store.known_modules() == [(name, module.model_dump(mode="json"))]


def test_two_engines_do_not_share_a_folder(store: Store) -> None:
    store.claim("one engine")
    Store(store.folder).claim("one engine")
    with pytest.raises(EngineRefusedError, match="Another engine"):
        Store(store.folder).claim("another engine")


def test_two_api_servers_of_one_engine_may_claim_at_the_same_moment(store: Store) -> None:
    with (store.folder / "engine.lock").open("w+") as first:
        fcntl.flock(first, fcntl.LOCK_EX)  # the other one is about to write
        released = threading.Timer(0.3, _claimed, (first, "one engine"))
        released.start()
        store.claim("one engine")
        released.join()


def _claimed(lock: TextIO, instance: str) -> None:
    lock.write(instance)
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_SH)


def test_one_change_at_a_time(store: Store) -> None:
    with (
        store.exclusive(),
        pytest.raises(StackConflictError, match="under way"),
        Store(store.folder).exclusive(patience=0.1),
    ):
        pytest.fail("two hold the lock")
    with store.exclusive(patience=0.1):
        pass


def test_a_dead_process_does_not_hold_the_lock(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    holding = context.Event()
    holder = context.Process(target=_hold, args=(str(store.folder), holding))
    holder.start()
    assert holding.wait(30)
    with pytest.raises(StackConflictError), store.exclusive(patience=0.1):
        pytest.fail("two hold the lock")
    holder.kill()
    holder.join()
    holder.close()
    with store.exclusive(patience=5):
        pass


def _hold(folder: str, holding: Event) -> None:
    with Store(Path(folder)).exclusive():
        holding.set()
        multiprocessing.Event().wait()
