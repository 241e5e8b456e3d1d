"""``patcher compare``: whether patches will be in each other's way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import existing_file, json_option
from patcher.cli.output import note, print_json, short, table
from patcher.cli.progress import shown_progress

if TYPE_CHECKING:
    from patcher.patch.compare import Comparison, Pair

_MEANS = {
    "independent": "They act on different inputs: expect each to work as it does alone.",
    "some": "They act on partly the same inputs: measure them together with `patcher evaluate`.",
    "strong": "They act on the same inputs: compute one on top of the other (`--on-top-of`).",
    "no shared module": "They change different weights, so their files tell nothing of each other.",
    "unknown": "They read different things; with --model they can be compared.",
    "on top of the other": "One requires the other, and was computed with it in force.",
    "conflict": "One says that it conflicts with the other: an engine refuses them together.",
}


@click.command()
@click.argument("paths", type=existing_file, metavar="A.st B.st…", nargs=-1, required=True)
@click.option(
    "--model",
    metavar="DIR_OR_HUB_ID",
    help="Measure inputs under this model's statistics, which are kept for the next time.",
)
@click.option("--device", default="auto", show_default=True, help="Where to compute them.")
@click.option("-v", "--verbose", is_flag=True, help="Say on stderr what is being done.")
@json_option
def compare(
    paths: tuple[Path, ...], model: str | None, device: str, verbose: bool, as_json: bool
) -> None:
    """Predict from the files whether patches will be in each other's way.

    For every pair, how far the inputs that they act on are the same: 0 for none, 1 for all.
    No forget set is needed, and without --model no model.
    """
    from patcher.patch import Patch
    from patcher.patch.compare import compare as run

    patches = [Patch.read(path) for path in paths]
    found = run(patches)  # first: what is wrong with the files needs no model to be told
    if model is not None:
        from patcher.unlearn.interference import statistics_of

        with shown_progress(verbose) as progress:
            statistics = statistics_of(model, patches, device=device, progress=progress)
        found = run(patches, statistics)
    if as_json:
        print_json(_document(paths, found))
    else:
        _print(paths, found)


def _document(paths: tuple[Path, ...], found: Comparison) -> dict[str, Any]:
    return {
        "patches": [
            {"id": patch.id, "path": str(path), "title": patch.manifest.title}
            for path, patch in zip(paths, found.patches, strict=True)
        ],
        "metric": "statistics" if found.whitened else "euclidean",
        "pairs": [
            {
                "first": found.patches[pair.first].id,
                "second": found.patches[pair.second].id,
                **pair.as_dict(),
            }
            for pair in found.pairs
        ],
    }


def _print(paths: tuple[Path, ...], found: Comparison) -> None:
    table(
        ["first", "second", ">shared modules", ">interference", "verdict"],
        [
            (
                _name(paths, found, pair.first),
                _name(paths, found, pair.second),
                len(pair.modules),
                "–" if pair.interference is None else f"{pair.interference:.3f}",
                pair.verdict,
            )
            for pair in sorted(found.pairs, key=_worst_first)
        ],
    )
    click.echo()
    for verdict in dict.fromkeys(pair.verdict for pair in sorted(found.pairs, key=_worst_first)):
        click.echo(f"{verdict}: {_MEANS[verdict]}")
    if not found.whitened:
        note("Inputs were measured as they are; --model weighs them as they occur.")


def _name(paths: tuple[Path, ...], found: Comparison, index: int) -> str:
    return f"{paths[index].name} {short(found.patches[index].id)}"


def _worst_first(pair: Pair) -> tuple[float, int, int]:
    return -(pair.interference or 0.0), pair.first, pair.second
