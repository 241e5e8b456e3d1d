"""bench/overlay.py and bench/client.py: what their figures are, and that a bar can be missed."""

from __future__ import annotations

import sys

import pytest

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "bench"))
import client
import overlay
from report import Spread


def found(overlaid: float, lora: float) -> overlay.Found:
    """A machine whose speed doubles in mid-run; the engines differ by the same factor all along."""
    pace = [0.5] * 4 + [0.25] * 2
    took = {
        overlay.PLAIN: pace,
        overlay.OVERLAID: [each * overlaid for each in pace],
        overlay.LORA: [each * lora for each in pace],
    }
    return {("empty", 2): dict.fromkeys(took, pace), ("patched", 2): took}


def test_ratios_are_of_engines_in_the_same_round() -> None:
    rows, drawn = overlay.compared(found(1.25, 5.0))
    assert drawn["overlaid, patched"][2] == pytest.approx((0.8, 0.8, 0.8))
    assert drawn["LoRA, patched"][2].median == pytest.approx(0.2)
    assert drawn["overlaid, empty"][2].median == 1.0
    assert overlay.PLAIN not in drawn
    assert [row["tokens/s"] for row in rows][:2] == [4.0, 4.0]  # two tokens in half a second


def test_an_overlay_is_held_against_the_lora_and_can_lose() -> None:
    (check,) = overlay.checks(found(1.25, 5.0))
    assert (check.ok, check.value) == (True, pytest.approx(4.0))
    (check,) = overlay.checks(found(2.0, 1.0))
    assert (check.ok, check.value) == (False, pytest.approx(0.5))
    assert check.why


def beyond(seconds: float) -> dict[str, Spread]:
    return {way: Spread.of([seconds]) for way in client.timed("a.st")}


def test_a_start_is_held_against_a_fifth_of_a_second_beyond_bare_python() -> None:
    assert [check.ok for check in client.checks(beyond(0.2), {"inspect": []})] == [True] * 4
    late = client.checks(beyond(0.3), {"inspect": []})
    assert [check.ok for check in late] == [False, False, False, True]
    assert "0.300 s" in late[1].why
    assert all(check.why for check in late[:3])


def test_a_command_that_loads_torch_is_named() -> None:
    guilty = client.checks(beyond(0.1), {"inspect": [], "log --help": ["torch"]})[-1]
    assert (guilty.ok, guilty.value) == (False, 1)
    assert "log --help" in guilty.why


def test_what_a_command_loads_is_seen() -> None:
    assert client.all_heavy([["--version"]]) == {"--version": []}
    commands = {words[0] for words in client.looking("a.st")}
    assert {"inspect", "log", "status", "verify-file", "compute"} <= commands


def test_a_program_that_loads_torch_is_seen_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WATCHED", client.WATCHED.replace("try:", "import torch\ntry:"))
    assert client.heavy(["--version"]) == ["torch"]
