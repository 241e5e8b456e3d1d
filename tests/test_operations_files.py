"""What docs/operations.md and the files beside it say is so."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import yaml
from prometheus_client import REGISTRY

from patcher.engine.metrics import metrics
from patcher.engine.stack import Stack
from patcher.engine.store import Store
from patcher.errors import PatcherError
from tests.conftest import REPOSITORY
from tests.small_patch import small_patch
from tests.test_client import subclasses

FILES = REPOSITORY / "docs" / "operations"


def known() -> set[str]:
    """The names of our samples, as Prometheus gets them."""
    told = metrics()
    told.in_force(["f" * 64])
    told.ended("done", 1.0, 30.0)
    return {s.name for m in REGISTRY.collect() for s in m.samples if s.name.startswith("patcher_")}


def named(expression: str) -> set[str]:
    return set(re.findall(r"patcher_\w+", expression))


def test_the_dashboard_asks_only_for_what_there_is() -> None:
    board = json.loads((FILES / "grafana.json").read_text())
    asked = [named(t["expr"]) for panel in board["panels"] for t in panel["targets"]]
    assert set().union(*asked) <= known()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_alerts_ask_only_for_what_there_is() -> None:
    (group,) = yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]:
        assert named(rule["expr"])
        assert named(rule["expr"]) <= known()


def test_every_error_is_explained() -> None:
    text = (REPOSITORY / "docs" / "operations.md").read_text()
    table = text[text.index("## What each error means") : text.index("## At 3 a.m.")]
    explained = set(re.findall(r"`([a-z-]+)`", table))
    assert {kind.code for kind in subclasses(PatcherError)} <= explained


def test_a_backup_of_a_store_in_use_restores(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.add_patch(small_patch(), "me")
    store.commit(Stack((small_patch().id,)), "change-done", {})
    restored = tmp_path / "restored"
    restored.mkdir(mode=0o700)
    with sqlite3.connect(store.path) as live, sqlite3.connect(restored / store.path.name) as copy:
        live.backup(copy)
    live.close()
    copy.close()
    again = Store(restored)
    assert again.in_force() == store.in_force()
    assert again.ledger() == store.ledger()
    assert again.patch_bytes(small_patch().id) == small_patch().data
