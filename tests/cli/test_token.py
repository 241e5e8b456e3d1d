"""``patcher token``: made and taken back on the engine's state folder."""

from __future__ import annotations

from pathlib import Path

from patcher.engine.auth import Role, authorise
from patcher.engine.store import Store
from tests.cli.running import document, run


def test_a_token_is_printed_once_and_taken_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = run("token", "grafana", "--state", tmp_path)
    assert made.exit_code == 0
    assert authorise(store, f"Bearer {made.stdout.strip()}", Role.read) == "grafana"
    told = document(run("token", "ci", "--role", "apply", "--state", tmp_path, "--json"))
    assert (told["name"], told["role"]) == ("ci", "apply")
    assert authorise(store, f"Bearer {told['token']}", Role.apply) == "ci"
    gone = document(run("token", "ci", "--remove", "--json", PATCHER_STATE=str(tmp_path)))
    assert gone == {"name": "ci", "removed": True}
    assert store.token_owner(told["token"]) is None


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    nowhere = run("token", "ci", "--state", tmp_path)
    assert nowhere.exit_code == 8
    assert "no engine's state folder" in nowhere.stderr
    assert list(tmp_path.iterdir()) == [], "nothing is made by looking"
    Store(tmp_path)
    assert run("token", "admin", "--state", tmp_path).exit_code == 2
    assert run("token", "ci", "--remove", "--state", tmp_path).exit_code == 2
    assert run("token", "ci", "--role", "king", "--state", tmp_path).exit_code == 2
