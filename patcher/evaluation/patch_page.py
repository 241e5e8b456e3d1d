"""A patch file, as one HTML page that opens offline: for whoever reviews it."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from ..patch import Patch, norms
from ..patch.files import write
from .page import figure, shell
from .plots import COLOURS
from .svg import Axis, Bar, Point, Track, axis, bars, plane
from .tables import table

MOST = 40  # modules in one plot of bars


def write_patch_page(path: str | Path, patch: Patch) -> None:
    """Write the page; the file is there whole or not at all.

    Raises:
        UsageError: the place can't be written.
    """
    write(path, patch_page(patch).encode("utf-8"))


def patch_page(patch: Patch) -> str:
    """The page's text: what the manifest says, and how strong the edit is where.

    Everything that comes from the file is escaped: it may be anybody's.
    """
    manifest = patch.manifest
    rows = [
        ["id", patch.id],
        ["title", manifest.title],
        ["created", f"{manifest.created} by {manifest.tool}"],
        ["base", f"{manifest.base.model} ({manifest.base.architecture})"],
        ["method", manifest.method.name],
        ["requests", str(manifest.requests.count)],
        ["commitment", manifest.requests.commitment],
        ["requires", " ".join(manifest.requires) or "–"],
        ["conflicts", " ".join(manifest.conflicts) or "–"],
    ]
    parts = [
        "<h1>A patch</h1>",
        table(["", ""], rows),
        *figure(
            "Singular values",
            _spectra(patch),
            "Of L R (or A B), a line for each module: how many directions the edit really has, and "
            "how far it moves an output along each.",
        ),
        *figure(
            "Norms by module",
            _norms(patch),
            "Frobenius norm of L R (or A B).",
        ),
        "<h2>Modules</h2>",
        _modules(patch),
    ]
    for title, value in (
        ("Hyperparameters", manifest.method.hyperparameters),
        ("What its maker measured", manifest.evaluation),
    ):
        if value:
            parts += [f"<h2>{escape(title)}</h2>", table(["", ""], _flat(value))]
    return shell(f"patcher inspect {patch.id[:12]}", parts)


def _spectra(patch: Patch) -> str:
    spectra = {n: norms.singular_values(d.left, d.right) for n, d in patch.deltas.items()}
    kinds = {name: f"s{i % COLOURS}" for i, name in enumerate(spectra)}
    points = [
        Point(number, float(value), kinds[name], f"{name}: {value:.4g}")
        for name, values in spectra.items()
        for number, value in enumerate(values, start=1)
    ]
    tracks = [
        Track(name, kinds[name], [(i, float(v)) for i, v in enumerate(values, start=1)])
        for name, values in spectra.items()
    ]
    longest = max(len(values) for values in spectra.values())
    across = Axis("number", 0.0, longest + 1.0, whole=True)
    up = axis("singular value", [point.y for point in points], zero=True)
    return plane(across, up, points, tracks=tracks)


def _norms(patch: Patch) -> str:
    rows = [Bar(name, delta.norm, f"{delta.norm:.4g}") for name, delta in patch.deltas.items()]
    return bars("norm", rows[:MOST])


def _modules(patch: Patch) -> str:
    body = [
        [
            name,
            delta.kind,
            str(delta.rank),
            f"{delta.norm:.4g}",
            f"{delta.spectral_norm:.4g}",
            "–" if delta.gain is None else f"{delta.gain:.4g}",
            "x".join(map(str, patch.manifest.base.modules[name].shape)),
            delta.dtype,
        ]
        for name, delta in patch.deltas.items()
    ]
    heads = ["module", "kind", ">rank", ">norm", ">largest", ">gain of D", ">shape", "stored as"]
    return table(heads, body)


def _flat(value: Any, prefix: str = "") -> list[list[str]]:
    if isinstance(value, dict):
        rows = [_flat(one, f"{prefix}.{name}" if prefix else name) for name, one in value.items()]
        return [row for part in rows for row in part]
    return [[prefix, str(value)]]
