"""The command's root: its sections, loaded lazily, and the one place where errors end."""

from __future__ import annotations

import difflib
import os
from importlib import import_module
from keyword import iskeyword
from typing import Any

import click

from patcher.cli.guard import close_quietly, guarded

# section -> {command: its module}
SECTIONS = {
    "Make a patch": {
        "compute": "compute",
        "evaluate": "measure",
        "inspect": "inspect",
        "compare": "compare",
        "methods": "methods",
    },
    "Review and sign a patch": {
        "diff": "review",
        "plan": "review",
        "merge": "review",
        "rebase": "review",
        "keygen": "trust",
        "sign": "trust",
        "verify-file": "trust",
        "push": "ship",
        "pull": "ship",
    },
    "Change a running engine": {
        "serve": "serve",
        "apply": "change",
        "revert": "change",
        "replace": "change",
        "confirm": "change",
    },
    "Look at a running engine": {
        "status": "look",
        "verify": "look",
        "log": "log",
        "certificate": "certificate",
    },
    "Ways out and in": {
        "export": "ways",
        "import": "ways",
    },
    "Set up": {
        "token": "token",
        "doctor": "setup",
        "completion": "setup",
    },
}


_BUSY = ("compute", "evaluate", "serve")  # these take all the cores that there are


class Root(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All the names, in the sections' order."""
        return [name for section in SECTIONS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        for section in SECTIONS.values():
            if cmd_name in section:
                module = import_module(f"patcher.cli.{section[cmd_name]}")
                own = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name.replace("-", "_")
                command: click.Command = getattr(module, own)
                return command
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Like click's, and suggests a name for one that doesn't exist."""
        names = self.list_commands(ctx)
        if not args[0].startswith("-") and args[0] not in names and not ctx.resilient_parsing:
            near = difflib.get_close_matches(args[0], names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        if args[0] not in _BUSY:
            # numpy's threads wait for each other: on a machine that serves, for half a second.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
            # Looked for in every package that is installed, for models that need none.
            os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands under their sections' headings."""
        width = max(map(len, self.list_commands(ctx)))
        for heading, section in SECTIONS.items():
            rows = []
            for name in section:
                command = self.get_command(ctx, name)
                assert command is not None
                rows.append((name.ljust(width), command.get_short_help_str(90)))
            with formatter.section(heading):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Like click's, which would make a closed pipe a failure of ours."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            close_quietly()

    def main(self, *args: Any, **options: Any) -> Any:
        """Run it; every way of ending becomes an exit code (see :mod:`patcher.cli.guard`)."""
        words = options.get("args", args[0] if args else None)
        return guarded(super().main, words, *args, **options)


@click.group(
    cls=Root,
    name="patcher",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(
    package_name="vllm-patcher", prog_name="patcher", message="%(prog)s %(version)s"
)
@click.option("--debug", is_flag=True, help="Show where an error comes from (or PATCHER_DEBUG=1).")
def cli(debug: bool) -> None:
    """Livepatch for the weights of a served language model.

    Make it forget while it serves, and take that back to the bit.
    """
