"""The documents say what the command does: commands, options, exit codes."""

from __future__ import annotations

import ast
import re

import click
import pytest

from patcher.cli.root import SECTIONS, cli
from patcher.errors import PatcherError
from tests.conftest import REPOSITORY
from tests.test_client import subclasses

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MANUAL = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
NAMES = {name for section in SECTIONS.values() for name in section}


def shell_lines() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, re.S)
    lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()]
    return [line.strip("$ \n") for line in lines if line.startswith("$ ")]


def test_the_manual_has_every_command_and_exit_code() -> None:
    assert {name for name in NAMES if f"`{name}`" not in MANUAL} == set()
    codes = {int(code) for code in re.findall(r"^\| (\d+)", MANUAL, re.M)}
    assert codes >= {kind.exit_code for kind in subclasses(PatcherError)}


def test_the_readmes_commands_and_options_exist() -> None:
    asked = [line.split() for line in shell_lines() if line.startswith("patcher ")]
    assert len(asked) >= 6
    for _, name, *words in asked:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, name
        if name == "serve":
            continue  # vLLM's options go through
        known = {option for param in command.params for option in param.opts}
        assert {word for word in words if word.startswith("-")} <= known, name


def test_the_readmes_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = {line.split()[1] for line in shell_lines() if line.startswith("make ")}
    assert targets >= {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_readmes_python_uses_names_that_exist() -> None:
    import patcher
    from patcher.client import Engine

    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = {"patcher": patcher, "engine": Engine}.get(node.value.id)
            if owner is not None:
                assert hasattr(owner, node.attr), node.attr


@pytest.mark.parametrize("text", [README, MANUAL], ids=["README", "manual"])
def test_links_between_the_documents_lead_somewhere(text: str) -> None:
    folder = REPOSITORY if text is README else REPOSITORY / "docs"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (folder / target).exists(), target
