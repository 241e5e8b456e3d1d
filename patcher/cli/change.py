"""Commands that change what a running engine serves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import (
    change_options,
    engine_options,
    existing_file,
    json_option,
    patch_file,
)
from patcher.cli.output import facts, note, print_json, short

if TYPE_CHECKING:
    from patcher.client import Engine
    from patcher.protocol import Change


@click.command()
@click.argument("patches", nargs=-1, required=True, type=patch_file, metavar="P.st|URL…")
@click.option(
    "--ttl",
    metavar="TIME",
    help="Revert these patches by themselves after that time, like 30m or 2h, unless `patcher "
    "confirm` comes first.",
)
@click.option(
    "--signature",
    "signatures",
    multiple=True,
    type=existing_file,
    metavar="P.st.sig",
    help="A signature of one of them; those beside the files go with them unasked.",
)
@engine_options
@change_options
@json_option
def apply(engine: Engine, patches: tuple[Path, ...], as_json: bool, **wishes: Any) -> None:
    """Put patches on the top of the stack, live.

    All of them or none, in one change. The files are checked before the engine is asked.
    """
    _print(engine.apply(*patches, **wishes), as_json)


@click.command()
@click.argument("ids", nargs=-1, metavar="ID…")
@click.option("--all", "everything", is_flag=True, help="All patches: the base again.")
@engine_options
@change_options
@json_option
def revert(
    engine: Engine,
    ids: tuple[str, ...],
    everything: bool,
    as_json: bool,
    **wishes: Any,
) -> None:
    """Take patches out of the stack, from anywhere in it.

    Ids may be shortened while they are unambiguous. The weights are afterwards those of a
    fresh fold of what is left; with nothing left, the base to the bit.
    """
    _print(engine.revert(*ids, all=everything, **wishes), as_json)


@click.command()
@click.argument("ids", nargs=-1, metavar="ID…")
@click.option("--all", "everything", is_flag=True, help="All patches of the stack.")
@click.option(
    "--by", "patch", required=True, type=patch_file, metavar="P.st|URL", help="The new patch."
)
@engine_options
@change_options
@json_option
def replace(
    engine: Engine,
    ids: tuple[str, ...],
    everything: bool,
    patch: Path,
    as_json: bool,
    **wishes: Any,
) -> None:
    """Put one patch in the place of others, in one change.

    For a new version of a patch, and for one that `patcher merge` made of several. It comes
    to lie where the lowest of them was.
    """
    _print(engine.replace(patch, *ids, all=everything, **wishes), as_json)


@click.command()
@click.argument("ids", nargs=-1, metavar="ID…")
@click.option("--all", "everything", is_flag=True, help="All patches of the stack.")
@engine_options
@json_option
def confirm(engine: Engine, ids: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Let patches stay that were applied with --ttl.

    Ids may be shortened while they are unambiguous.
    """
    confirmed = engine.confirm(*ids, all=everything)
    if as_json:
        print_json({"confirmed": confirmed})
    else:
        click.echo(f"Confirmed: {', '.join(map(short, confirmed)) or 'nothing, all of it stays'}.")


def _print(change: Change, as_json: bool) -> None:
    for question in change.get("questions", []):
        note(f"question: {question}")
    if as_json:
        print_json(change)
        return
    in_force = ", ".join(map(short, reversed(change["stack"]))) or "nothing: the base"
    rows = [
        (
            "done in",
            f"{change['seconds']:.2f} s, serving paused for {change['pause_ms']:.0f} ms",
        ),
        ("in force", in_force),
        ("weight version", change["weight_version"]),
    ]
    if guarded := change.get("guards"):
        rows.append(("guards", f"{len(guarded)} bound(s) hold"))
    facts(rows)
