"""Commands that make a patch and look at what it does; no engine needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import Command, existing_file, json_option, stack_options
from patcher.cli.output import facts, print_json, short, size, table
from patcher.cli.progress import shown_progress

if TYPE_CHECKING:
    from patcher.patch import Patch


def data_options(command: Command) -> Command:
    """The model, the forget set, and which of its facts count."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Say on stderr what is being done."),
        click.option("--device", default="auto", show_default=True, help="Where to compute."),
        click.option("--limit", type=click.IntRange(min=1), help="Take the first N facts."),
        click.option("--known-only", is_flag=True, help="Leave out what the model doesn't know."),
        click.option(
            "--forget",
            required=True,
            type=existing_file,
            metavar="F.jsonl",
            help="The forget set: JSON Lines with at least prompt (or messages) and target.",
        ),
        click.option(
            "--model",
            required=True,
            metavar="DIR_OR_HUB_ID",
            help="The model, as transformers names it.",
        ),
    ):
        command = option(command)
    return command


@click.command()
@data_options
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="P.st",
    help="The patch file to write.",
)
@click.option("--method", default="zero", show_default=True, help="How the edit is computed.")
@click.option(
    "--layers", default="auto", show_default=True, metavar="auto|9,10,11", help="Which to edit."
)
@click.option(
    "--reference",
    type=existing_file,
    metavar="TEXT",
    help="Plain text like what must be preserved, to estimate its statistics on.",
)
@click.option(
    "--target",
    metavar="eos|suppress|TEXT",
    help="What is to come instead: the end of the answer, anything but the answer, or this text.",
)
@click.option(
    "--preserve",
    type=existing_file,
    metavar="R.jsonl",
    help="Facts that must stay, in the same form; they join the statistics.",
)
@click.option(
    "--dtype", default="auto", show_default=True, help="The type that the weights are served in."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--title", metavar="TEXT", help="A name for people; it stands in the file.")
@stack_options
@json_option
def compute(as_json: bool, verbose: bool, **wishes: Any) -> None:
    """Compute an edit and write it as a patch file."""
    from patcher.unlearn import compute as run

    with shown_progress(verbose) as progress:
        result = run(**_given(wishes), progress=progress)
    document = result.as_dict()
    if as_json:
        print_json(document)
        return
    facts(
        [
            ("patch", f"{result.path} ({size(result.bytes)})"),
            ("id", result.id),
            ("facts", f"{result.facts}, {result.known} of them known to the model"),
            ("modules", ", ".join(f"{n} (rank {r})" for n, r in result.modules.items())),
            ("took", f"{result.seconds:.1f} s"),
        ]
    )
    click.echo()
    facts(_effect(result.evaluation))


@click.command()
@click.argument("path", type=existing_file, metavar="P.st")
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show what a patch file holds and whether it is sound.

    Every byte of it is read and checked; exit code 3 if it is damaged or malformed.
    """
    from patcher.patch import Patch

    patch = Patch.read(path)
    if as_json:
        print_json(_document(path, patch))
    else:
        _print_patch(path, patch)


def _given(wishes: Mapping[str, Any]) -> dict[str, Any]:
    # An option that wasn't given leaves the default to the function.
    return {name: value for name, value in wishes.items() if value is not None}


def _effect(found: Mapping[str, Any]) -> list[tuple[str, object]]:
    # What the check on the rounded weights found, in words.
    wordings, others, kept = (found[n] for n in ("paraphrases", "others_unchanged", "preserved"))
    below = found.get("still_forgotten") or {"patched": 0, "base": 0, "of": 0}
    ratio = found["perplexity_ratio"]
    rows = [
        ("still answered", f"{found['answered']} of {found['facts']}"),
        ("in generated text", f"{found['leaked']['patched']} of {found['facts']}"),
        (
            "other wordings",
            f"{wordings['patched']} of {wordings['of']} (before {wordings['base']})",
        ),
        ("others unchanged", f"{others['same']} of {others['of']}"),
        ("to be preserved", f"{kept['patched']} of {kept['of']} (before {kept['base']})"),
        ("still forgotten", f"{below['patched']} of {below['of']} (before {below['base']})"),
        ("perplexity", "–" if ratio is None else f"{round(100 * (ratio - 1), 2) + 0.0:+.2f} %"),
    ]
    return [(name, text) for name, text in rows if " of 0" not in text]


def _document(path: Path, patch: Patch) -> dict[str, Any]:
    modules = {
        name: {
            "kind": delta.kind,
            "rank": delta.rank,
            "norm": delta.norm,
            "shape": list(patch.manifest.base.modules[name].shape),
            "dtype": delta.dtype,
        }
        for name, delta in patch.deltas.items()
    }
    return {
        "id": patch.id,
        "path": str(path),
        "bytes": len(patch.data),
        "modules": modules,
        "manifest": patch.manifest.model_dump(mode="json"),
        "sound": True,
    }


def _print_patch(path: Path, patch: Patch) -> None:
    manifest = patch.manifest
    facts(
        [
            ("file", f"{path}: sound, {size(len(patch.data))}, format {manifest.format}"),
            ("id", patch.id),
            ("title", manifest.title or "–"),
            ("created", f"{manifest.created} by {manifest.tool}"),
            ("base", f"{manifest.base.model} ({manifest.base.architecture})"),
            ("method", manifest.method.name),
            ("requests", manifest.requests.count),
            ("requires", ", ".join(map(short, manifest.requires)) or "–"),
            ("conflicts", ", ".join(map(short, manifest.conflicts)) or "–"),
        ]
    )
    click.echo()
    table(
        ["module", "kind", ">rank", ">norm", ">shape", "stored as"],
        [
            (
                n,
                d["kind"],
                d["rank"],
                f"{d['norm']:.4g}",
                "x".join(map(str, d["shape"])),
                d["dtype"],
            )
            for n, d in _document(path, patch)["modules"].items()
        ],
    )
    if manifest.evaluation:
        click.echo()
        facts(_figures(manifest.evaluation))


def _figures(figures: Mapping[str, Any], prefix: str = "measured ") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            rows += _figures(value, f"{prefix}{name} ")
        else:
            rows.append((f"{prefix}{name}", f"{value:.4g}" if isinstance(value, float) else value))
    return rows
