"""Colours, tables and bars on a terminal; plain text in a pipe."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from patcher.cli.progress import shown_progress
from tests.cli.running import on_terminal, run


def test_a_terminal_gets_a_drawn_table_and_a_pipe_does_not(patch_file: Path) -> None:
    shown = on_terminal("inspect", str(patch_file))
    assert "\x1b[" in shown
    assert "─" in shown
    piped = run("inspect", patch_file).stdout
    assert "\x1b" not in piped
    assert "─" not in piped


def test_no_color_is_honoured_on_a_terminal(patch_file: Path) -> None:
    shown = on_terminal("inspect", str(patch_file), NO_COLOR="1")
    assert "\x1b[3" not in shown  # no foreground colour
    assert "─" in shown
    error = on_terminal("status", "--engine", "nowhere", NO_COLOR="1")
    assert "\x1b" not in error


def test_errors_are_red_on_a_terminal() -> None:
    assert "\x1b[31m" in on_terminal("status", "--engine", "nowhere")


def test_a_bar_shows_the_loss_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    with shown_progress(verbose=False) as progress:
        progress.start("values [3/5]", 10)
        progress.step(4, "loss 1.23")
        progress.finish()
        progress.start("check", None)
        progress.step(1)
        progress.finish()
    shown = screen.getvalue()
    assert "loss 1.23" in shown
    assert "values [3/5]" in shown
