"""``patcher inspect``: what a patch file holds; no engine needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import json_option, patch_file
from patcher.cli.output import facts, print_json, short, size, table

if TYPE_CHECKING:
    from patcher.patch import Patch


@click.command()
@click.argument("path", type=patch_file, metavar="P.st|URL")
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="Write it as a page with plots, too, which opens offline.",
)
@json_option
def inspect(path: Path, report: Path | None, as_json: bool) -> None:
    """Show what a patch file holds and whether it is sound.

    Every byte of it is read and checked; exit code 3 if it is damaged or malformed.
    """
    from patcher.patch import Patch

    patch = Patch.read(path)
    if report is not None:
        from patcher.evaluation.patch_page import write_patch_page

        write_patch_page(report, patch)
    if as_json:
        print_json(_document(path, patch))
    else:
        _print_patch(path, patch)


def _document(path: Path, patch: Patch) -> dict[str, Any]:
    modules = {
        name: {
            "kind": delta.kind,
            "rank": delta.rank,
            "norm": delta.norm,
            "spectral_norm": delta.spectral_norm,
            "gain": delta.gain,
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
        ["module", "kind", ">rank", ">norm", ">gain", ">spectral", ">shape", "stored as"],
        [
            (
                n,
                d["kind"],
                d["rank"],
                f"{d['norm']:.4g}",
                "–" if d["gain"] is None else f"{d['gain']:.4g}",
                f"{d['spectral_norm']:.4g}",
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
