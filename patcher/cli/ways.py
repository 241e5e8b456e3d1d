"""``patcher export`` and ``patcher import``: patches in other programs' formats, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from patcher.cli.options import (
    existing_file,
    json_option,
    output_option,
)
from patcher.cli.output import facts, note, print_json, short, size, table
from patcher.cli.progress import shown_progress
from patcher.errors import UsageError

if TYPE_CHECKING:
    from patcher.export import Adapter, Imported, Merged

_FAR = 0.5  # of the edit: what misses more than that has hardly been imported
_LARGEST_RANK = 512  # that vLLM 0.32 takes
_folder = click.Path(path_type=Path)
_verbose = click.option("-v", "--verbose", is_flag=True, help="Say on stderr what is being done.")


@click.command()
@click.argument("paths", type=existing_file, metavar="P.st…", nargs=-1, required=True)
@click.option(
    "--peft", type=_folder, metavar="DIR", help="Write a LoRA adapter that PEFT and vLLM load."
)
@click.option(
    "--checkpoint",
    type=_folder,
    metavar="DIR",
    help="Write the model with the patches folded in, as an engine serves it, to the bit.",
)
@click.option(
    "--model",
    metavar="DIR_OR_HUB_ID",
    help="The model that the patches were computed on; only additive patches can be exported "
    "with --peft without it.",
)
@_verbose
@json_option
def export(
    paths: tuple[Path, ...],
    peft: Path | None,
    checkpoint: Path | None,
    model: str | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Write patches as a LoRA adapter or as a merged checkpoint.

    Several patches are one stack, the bottom first. DIR must not exist yet, or be empty.
    """
    if (peft is None) == (checkpoint is None):
        raise UsageError("What to export to?", "Give one of --peft DIR and --checkpoint DIR.")
    if checkpoint is not None and model is None:
        raise UsageError("A checkpoint needs the model.", "Give --model DIR_OR_HUB_ID.")
    from patcher.export import to_checkpoint, to_peft

    result: Adapter | Merged
    if peft is not None:
        result = to_peft(paths, peft, model)
    else:
        assert checkpoint is not None
        assert model is not None
        with shown_progress(verbose) as progress:
            result = to_checkpoint(paths, checkpoint, model, progress)
    if as_json:
        print_json(result.as_dict())
    else:
        _print_export(result)


def _print_export(result: Adapter | Merged) -> None:
    written = result.as_dict()
    rows: list[tuple[str, object]] = [
        ("written", f"{result.path} ({size(result.bytes)})"),
        ("patches", ", ".join(map(short, result.patches))),
        ("modules", ", ".join(result.modules)),
    ]
    if "rank" in written:
        rows.append(("rank", written["rank"]))
        if written["rank"] > _LARGEST_RANK:
            note(f"vLLM takes adapters up to rank {_LARGEST_RANK}; a checkpoint has no such bound.")
    if written.get("left_out"):
        rows.append(("left out", ", ".join(written["left_out"])))
        note("What was left out may hold the weights as they were before.")
    facts(rows)


@click.command("import")
@click.option(
    "--peft",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Import this LoRA adapter; needs --model.",
)
@click.option("--model", metavar="DIR_OR_HUB_ID", help="The model that the adapter acts on.")
@click.option(
    "--diff",
    nargs=2,
    metavar="BASE EDITED",
    help="Import what makes the second checkpoint of the first.",
)
@output_option("The patch file to write.", "P.st")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="With --diff: this rank for every weight, not the smallest that tells the edit from "
    "rounding.",
)
@click.option(
    "--dtype", default="auto", show_default=True, help="The type that the weights are served in."
)
@click.option("--title", metavar="TEXT", help="A name for people; it stands in the file.")
@_verbose
@json_option
def import_(
    peft: Path | None,
    model: str | None,
    diff: tuple[str, str] | None,
    output: Path,
    rank: int | None,
    dtype: str,
    title: str | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Make a patch of a LoRA adapter, or of the difference of two checkpoints.

    How far the served weights will be from the imported ones is printed, and stands in the file.
    """
    if (peft is None) == (diff is None):
        raise UsageError(
            "What to import?", "Give one of --peft DIR --model M and --diff BASE EDITED."
        )
    if (peft is None) != (model is None):
        raise UsageError("--peft and --model belong together.", "Give both, or --diff alone.")
    if rank is not None and diff is None:
        raise UsageError("--rank is for --diff.", "Leave it out: an adapter has its own.")
    from patcher.export import from_checkpoints, from_peft

    with shown_progress(verbose) as progress:
        if diff is not None:
            result = from_checkpoints(
                *diff, output, rank=rank, dtype=dtype, title=title, progress=progress
            )
        else:
            assert peft is not None
            assert model is not None
            result = from_peft(peft, model, output, dtype=dtype, title=title, progress=progress)
    if as_json:
        print_json(result.as_dict())
    else:
        _print_import(result)
    _warn(result)


def _print_import(result: Imported) -> None:
    facts(
        [
            ("patch", f"{result.path} ({size(len(result.patch.data))})"),
            ("id", result.patch.id),
        ]
    )
    click.echo()
    table(
        ["module", "kind", ">rank", ">error", ">rounded"],
        [
            (
                name,
                one["kind"],
                one["rank"],
                f"{one['error']:.2g}",
                f"{one['rounded_error']:.2g}",
            )
            for name, one in result.as_dict()["modules"].items()
        ],
    )


def _warn(result: Imported) -> None:
    far = [name for name, one in result.figures.items() if one.rounded_error > _FAR]
    if far:
        note(
            f"Of the edit of {len(far)} module(s), such as {far[0]}, more than half is lost: it is"
            " as small as the rounding of the weights, or needs a higher rank.",
            style="yellow",
        )
