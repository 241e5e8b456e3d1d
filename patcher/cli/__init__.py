"""The command ``patcher``: words and exit codes; what is done is done elsewhere."""

from __future__ import annotations


def main() -> None:
    """Run the command with the process's arguments, and exit."""
    from patcher.cli.root import cli

    cli()
