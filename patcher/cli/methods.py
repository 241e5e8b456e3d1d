"""``patcher methods``: how an edit can be computed."""

from __future__ import annotations

import click

from patcher.cli.options import json_option
from patcher.cli.output import facts, print_json


@click.command()
@json_option
def methods(as_json: bool) -> None:
    """List the methods: what each does, its source, its cost and what it needs."""
    from patcher.unlearn.registry import METHODS

    if as_json:
        print_json({"methods": [entry.as_dict() for entry in METHODS.values()]})
        return
    for number, entry in enumerate(METHODS.values()):
        if number:
            click.echo()
        facts(
            [
                ("method", entry.name),
                ("does", entry.summary),
                ("source", entry.source),
                ("cost", entry.cost),
                ("needs", entry.needs),
                ("writes", f"{entry.kind} deltas"),
                ("bars", "tried again" if entry.repeats else "measured once"),
            ]
        )
