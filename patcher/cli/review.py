"""Commands that review patches before anybody applies them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import (
    engine_options,
    existing_file,
    json_option,
    output_option,
    patch_file,
)
from patcher.cli.output import facts, note, print_json, short, size, table
from patcher.cli.progress import shown_progress

if TYPE_CHECKING:
    from patcher.client import Engine
    from patcher.patch import Patch
    from patcher.patch.difference import Difference, ModuleDifference
    from patcher.protocol import Plan


@click.command()
@click.argument("first", type=patch_file, metavar="A.st")
@click.argument("second", type=patch_file, metavar="B.st")
@json_option
def diff(first: Path, second: Path, as_json: bool) -> None:
    """Show what differs between two patch files.

    Fields of the manifests, and for each module how far apart the two edits are: 0 for the
    same one, however it is stored.
    """
    from patcher.patch import Patch
    from patcher.patch.difference import difference

    patches = [Patch.read(path) for path in (first, second)]
    found = difference(*patches)
    if as_json:
        modules = {name: asdict(one) for name, one in found.modules.items()}
        ids = {"first": patches[0].id, "second": patches[1].id}
        print_json({**ids, "same": found.same, "fields": found.fields, "modules": modules})
    else:
        _print_difference(found)


def _print_difference(found: Difference) -> None:
    if found.same:
        click.echo("They are the same.")
        return
    if found.fields:
        rows = [(name, _brief(one), _brief(other)) for name, (one, other) in found.fields.items()]
        table(["field", "first", "second"], rows)
        click.echo()
    table(
        ["module", "first", "second", ">apart", "base"],
        [(name, *_module_row(one)) for name, one in found.modules.items()],
    )


def _module_row(one: ModuleDifference) -> tuple[str, str, str, str]:
    sides = [
        "–"
        if told is None
        else f"{told['kind']} rank {told['rank']} {told['dtype']} norm {told['norm']:.4g}"
        for told in (one.first, one.second)
    ]
    apart = "–" if one.distance is None else f"{one.distance:.3g}"
    base = {None: "–", True: "the same", False: "DIFFERENT"}[one.same_base]
    return sides[0], sides[1], apart, base


def _brief(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


@click.command()
@click.argument("paths", type=existing_file, metavar="A.st B.st…", nargs=-1, required=True)
@output_option("The new patch file.")
@click.option(
    "--rank", type=click.IntRange(min=1), help="At most this rank on every module; else exact."
)
@click.option(
    "--model",
    metavar="DIR_OR_HUB_ID",
    help="Keep what matters most for the inputs that this model sees, and measure so.",
)
@click.option("--title", help="Of the new patch. Must hold nothing of what is to be forgotten.")
@click.option("--device", default="auto", show_default=True, help="Where to compute statistics.")
@click.option("-v", "--verbose", is_flag=True, help="Say on stderr what is being done.")
@json_option
def merge(
    paths: tuple[Path, ...],
    output: Path,
    rank: int | None,
    model: str | None,
    title: str | None,
    device: str,
    verbose: bool,
    as_json: bool,
) -> None:
    """Make one patch of several, the bottom of the stack first.

    Without --rank it does what they do together. With it, the error is told: how much of what
    they add to the outputs is lost.
    """
    from patcher.patch import Patch
    from patcher.patch.files import check_place
    from patcher.patch.merge import merge as run

    check_place(output)
    patches = [Patch.read(path) for path in paths]
    statistics = None
    if model is not None:
        from patcher.unlearn.interference import statistics_of

        with shown_progress(verbose) as progress:
            statistics = statistics_of(model, patches, device=device, progress=progress)
    merged = run(patches, rank=rank, statistics=statistics, title=title)
    merged.patch.write(output)
    worst = max(float(one["error"]) for one in merged.modules.values())
    if as_json:
        print_json(
            {
                "id": merged.patch.id,
                "path": str(output),
                "bytes": len(merged.patch.data),
                "metric": "statistics" if merged.whitened else "euclidean",
                "error": worst,
                "modules": merged.modules,
            }
        )
        return
    facts([("file", f"{output}: {size(len(merged.patch.data))}"), ("id", merged.patch.id)])
    click.echo()
    table(
        ["module", ">rank", ">of", ">error"],
        [(n, o["rank"], o["of"], f"{o['error']:.3g}") for n, o in merged.modules.items()],
    )
    if worst and not merged.whitened:
        note("The error is of the edit as such; with --model it is of what it adds to outputs.")


@click.command()
@click.argument("patches", nargs=-1, required=True, type=patch_file, metavar="P.st|URL…")
@click.option(
    "--signature",
    "signatures",
    multiple=True,
    type=existing_file,
    metavar="P.st.sig",
    help="A signature of one of them; those beside the files go with them unasked.",
)
@engine_options
@json_option
def plan(
    engine: Engine, patches: tuple[Path, ...], signatures: tuple[Path, ...], as_json: bool
) -> None:
    """Show what `apply` would do to a running engine, and do nothing.

    Every rank checks the weights and prepares the change beside them, then lets go of it.
    Where it would be refused, the exit code is that of the refusal.
    """
    from patcher.patch import Patch

    read = [Patch.read(path) for path in patches]
    found = engine.plan(*patches, signatures=signatures)
    pairs = _interference(engine, read, found) if found["ok"] else []
    if as_json:
        print_json({**found, "interference": pairs})
    else:
        _print_plan(found, pairs)
    if not found["ok"]:
        raise click.exceptions.Exit(found["refusals"][0]["exit_code"])


def _interference(engine: Engine, new: list[Patch], found: Plan) -> list[dict[str, Any]]:
    """How much the new patches and those in force are in each other's way."""
    from patcher.patch.compare import compare

    ids = {patch.id for patch in new}
    below = [engine.download(one) for one in found["stack"] if one not in ids]
    if len(below) + len(new) < 2:
        return []
    told = compare([*below, *new])
    return [
        {
            "first": told.patches[pair.first].id,
            "second": told.patches[pair.second].id,
            "interference": pair.interference,
            "verdict": pair.verdict,
        }
        for pair in told.pairs
        if told.patches[pair.second].id in ids
    ]


def _print_plan(found: Plan, pairs: list[dict[str, Any]]) -> None:
    for refusal in found["refusals"]:
        note(f"refused: {refusal['message']} {refusal['cure']}", style="red")
    for question in found["questions"]:
        note(f"question: {question}")
    pause = "not known yet" if found["pause_ms"] is None else f"about {found['pause_ms']:.0f} ms"
    facts(
        [
            ("would be in force", ", ".join(map(short, reversed(found["stack"])))),
            ("weight version", found["weight_version"]),
            ("prepared in", f"{found['seconds']:.2f} s"),
            ("memory", f"{size(found['staged_bytes'])} while it is prepared, "
                       f"{size(found['base_bytes'])} of the host while it is in force"),
            ("pause", pause),
            *((f"signed ({short(i)})", ", ".join(who)) for i, who in found["signers"].items()),
        ]
    )  # fmt: skip
    click.echo()
    table(
        ["module", "patches (top first)"],
        [(n, ", ".join(map(short, reversed(m["patches"])))) for n, m in found["modules"].items()],
    )
    if pairs:
        click.echo()
        table(
            ["beneath", "new", ">interference", "verdict"],
            [
                (
                    short(p["first"]),
                    short(p["second"]),
                    "–" if p["interference"] is None else f"{p['interference']:.3f}",
                    p["verdict"],
                )
                for p in pairs
            ],
        )
    click.echo()
    click.echo("Nothing was done." if found["ok"] else "It would be refused; nothing was done.")


@click.command()
@click.argument("path", type=existing_file, metavar="P.st")
@click.option(
    "--onto", "model", required=True, metavar="DIR_OR_HUB_ID", help="The model to move it to."
)
@output_option("The new patch file.")
@click.option(
    "--dtype", default="auto", show_default=True, help="What that model will be served in."
)
@json_option
def rebase(path: Path, model: str, output: Path, dtype: str, as_json: bool) -> None:
    """Make a patch fit the same weights under other names, or served in another dtype.

    The edit stays as it is. Where the weights themselves are others, the patch must be
    computed again: exit code 4.
    """
    from patcher.export import rebase as run
    from patcher.patch import Patch
    from patcher.patch.files import check_place

    check_place(output)
    patch = Patch.read(path)
    found = run(patch, model, dtype=dtype)
    found.patch.write(output)
    if as_json:
        print_json(
            {
                "id": found.patch.id,
                "path": str(output),
                "bytes": len(found.patch.data),
                "from": patch.id,
                "dtype": found.dtype,
                "modules": found.names,
            }
        )
        return
    facts([("file", output), ("id", found.patch.id), ("to be served in", found.dtype)])
    moved = [(old, new) for old, new in found.names.items() if old != new]
    if moved:
        click.echo()
        table(["was", "is"], moved)
    note("Its figures were measured on the other one: measure again with `patcher evaluate`.")
