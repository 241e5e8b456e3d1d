"""What the environment means to the plugin."""

from __future__ import annotations

from pathlib import Path

import pytest

from patcher.engine import serve
from patcher.engine.settings import Settings, asked_for, default_state
from patcher.errors import UsageError


@pytest.mark.parametrize(
    ("plugins", "expected"),
    [(None, False), ("", False), ("other", False), ("patcher", True), ("other,patcher", True)],
)
def test_inert_unless_named(plugins: str | None, expected: bool) -> None:
    assert asked_for({} if plugins is None else {"VLLM_PLUGINS": plugins}) is expected


def test_models_do_not_share_a_state_folder() -> None:
    home = {"XDG_STATE_HOME": "/h"}
    folders = {default_state(m, home) for m in ("Qwen/Qwen3-4B", "Qwen3-4B", "other/Qwen3-4B")}
    assert len(folders) == 3
    assert all(f.parent == Path("/h/vllm-patcher") for f in folders)


def test_token_lies_in_the_state_folder_unless_named() -> None:
    assert Settings.read("m", {"PATCHER_STATE": "/s"}).token_file == Path("/s/token")
    named = Settings.read("m", {"PATCHER_STATE": "/s", "PATCHER_TOKEN_FILE": "/t"})
    assert named.token_file == Path("/t")


def test_kill_switches() -> None:
    assert not Settings.read("m", {"PATCHER_DISABLE": "0"}).disabled
    assert Settings.read("m", {"PATCHER_DISABLE": "1"}).disabled
    assert Settings.read("m", {"PATCHER_NO_RESTORE": "true"}).no_restore


def test_serve_keeps_the_plugins_that_vllm_would_have_loaded() -> None:
    names = serve.plugin_list({}).split(",")
    assert names.count("patcher") == 1
    assert "lora_filesystem_resolver" in names, "vLLM's own plugins load by default"


def test_serve_keeps_an_allowlist_that_is_set() -> None:
    assert serve.plugin_list({"VLLM_PLUGINS": "one,two"}) == "one,two,patcher"
    assert serve.plugin_list({"VLLM_PLUGINS": ""}) == "patcher"
    assert serve.plugin_list({"VLLM_PLUGINS": "patcher"}) == "patcher"


def test_serve_changes_nothing_but_its_settings(tmp_path: Path) -> None:
    before = {"PATH": "/bin", "VLLM_PLUGINS": "patcher"}
    after = serve.environment_for(before, state=tmp_path, token_file=None, no_restore=True)
    assert after == {**before, "PATCHER_STATE": str(tmp_path), "PATCHER_NO_RESTORE": "1"}


def test_spacing_has_a_default_and_bounds() -> None:
    assert Settings.read("m", {}).spacing == 10.0
    assert Settings.read("m", {"PATCHER_SPACING": "2.5"}).spacing == 2.5
    assert Settings.read("m", {"PATCHER_SPACING": "0"}).spacing == 0.0
    for given in ("soon", "-1", "61", "nan", "inf"):
        with pytest.raises(UsageError, match="PATCHER_SPACING"):
            Settings.read("m", {"PATCHER_SPACING": given})
