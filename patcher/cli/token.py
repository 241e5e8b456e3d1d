"""``patcher token``: tokens that may do less than the one that the first start makes."""

from __future__ import annotations

from pathlib import Path

import click

from patcher.cli.options import json_option
from patcher.cli.output import note, print_json

_ROLES = ("read", "apply", "admin")


@click.command()
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(_ROLES),
    default="read",
    show_default=True,
    help="What it may: look; also change the stack; everything.",
)
@click.option("--remove", is_flag=True, help="Take the token of that name back.")
@click.option(
    "--state",
    required=True,
    envvar="PATCHER_STATE",
    show_envvar=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The engine's state folder, on its machine.",
)
@json_option
def token(name: str, role: str, remove: bool, state: Path, as_json: bool) -> None:
    """Make a token for somebody, or a dashboard, and print it: nobody can look it up later.

    A second one of the same NAME takes the place of the first. NAME is the actor in the ledger.
    A running engine knows it at once.
    """
    from patcher.engine.auth import issue, withdraw
    from patcher.engine.store import opened

    store = opened(state)
    if remove:
        withdraw(store, name)
        if as_json:
            print_json({"name": name, "removed": True})
        else:
            note(f"The token {name!r} opens nothing any more.")
        return
    made = issue(store, name, role)
    if as_json:
        print_json({"name": name, "role": role, "token": made})
    else:
        click.echo(made)
