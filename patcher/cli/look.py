"""Commands that only look at a running engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from patcher.cli.options import engine_options, json_option
from patcher.cli.output import facts, note, print_json, short, table
from patcher.errors import VerificationError

if TYPE_CHECKING:
    from patcher.client import Engine
    from patcher.protocol import Status


@click.command()
@engine_options
@json_option
def status(engine: Engine, as_json: bool) -> None:
    """Show what is in force, per patch and per module."""
    answer = engine.status()
    if as_json:
        print_json(answer)
    else:
        _print_status(answer)


@click.command()
@click.option("--heal", is_flag=True, help="First put back what a weight reload reset to the base.")
@engine_options
@json_option
def verify(engine: Engine, heal: bool, as_json: bool) -> None:
    """Compare the live weights with what they must be.

    Every rank of the engine reads the weights that it serves and compares them with what the
    base and the stack must give. Exit code 9 if one differs.
    """
    answer = engine.heal() if heal else engine.verify()
    if as_json:
        print_json(answer)
    else:
        rows = sorted(answer["modules"].items())
        if rows:
            table(
                ["module", "live weights"],
                [(n, "as must be" if ok else "DIFFER") for n, ok in rows],
            )
        click.echo(f"{len(rows)} modules read on every rank.")
    if not answer["ok"]:
        note("error: the live weights are not what base and stack must give.", style="red")
        note(
            "After a weight reload: `patcher verify --heal`. Otherwise restart the engine: it "
            "restores the committed stack from the pristine base."
        )
        raise click.exceptions.Exit(VerificationError.exit_code)
    if not as_json:
        click.echo("All of them are what base and stack must give.")


def _print_status(answer: Status) -> None:
    engine = answer["engine"]
    facts(
        [
            ("engine", f"vLLM {engine['vllm']}, patcher {engine['patcher']}, {engine['platform']}"),
            ("model", engine["model"]),
            ("state", f"{engine['state']}, {engine['world_size']} rank(s)"),
            ("weight version", answer["weight_version"]),
            ("in force", f"{len(answer['stack'])} patch(es)"),
        ]
    )
    if answer.get("overlaid"):
        count = len(answer["overlaid"])
        note(f"{count} of the modules are quantised: their patches cost time at every token.")
    if not answer["stack"]:
        return
    click.echo()
    # A column of its own only where something ends by itself.
    ends = ["expires"] if any(one.get("expires") for one in answer["patches"]) else []
    table(
        ["patch (top first)", "title", "since", *ends, ">modules"],
        [
            (
                *(short(one["id"]), one["title"], one["since"]),
                *(one.get("expires") or "stays" for _ in ends),
                len(one["modules"]),
            )
            for one in reversed(answer["patches"])
        ],
    )
    click.echo()
    ranks = {one["id"]: one["modules"] for one in answer["patches"]}
    table(
        ["module", "patches (top first) and their ranks"],
        [
            (name, ", ".join(f"{short(i)} {ranks[i][name]}" for i in reversed(ids)))
            for name, ids in sorted(answer["modules"].items())
            if ids
        ],
    )
