"""The command ``patcher``: words and exit codes; what is done is done elsewhere."""

from __future__ import annotations

import gc


def main() -> None:
    """Run the command with the process's arguments, and exit."""
    # What imports make stays: looking through it for garbage took a sixth of a start.
    gc.set_threshold(100_000)
    from patcher.cli.root import cli

    cli()
