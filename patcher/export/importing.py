"""What the ways in share: which weights a patch may change, how far off it is, its manifest."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ModelError, UsageError
from ..kernels import fold
from ..patch import (
    Base,
    Delta,
    Manifest,
    Method,
    ModuleBase,
    Patch,
    Requests,
    commitment,
    owner_salt,
)
from ..patch.container import MAX_FILE_BYTES
from ..patch.manifest import check_title
from .checkpoints import Checkpoint

# Projections that vLLM serves fused with others (0.32: stacked_params_mapping), so that an
# engine finds no module of that name.
_FUSED = {
    "gate_proj", "k", "k_proj", "q", "q_proj", "up_proj", "v", "v_proj", "w1", "w3", "wk", "wq",
    "wv",
}  # fmt: skip
_LAYER = re.compile(r"(^|\.)\d+\.")
_SHOWN = 8  # names in a message


class Figures(NamedTuple):
    """How far a module's patch is from what was imported, relative to the size of the edit.

    By Frobenius norms. ``error``: before the weights are rounded; ``rounded_error``: of the
    weights as they are served, 0 where they are the wanted ones to the bit.
    """

    error: float
    rounded_error: float


@dataclass(frozen=True)
class Imported:
    """A patch that was made of another's edit, and its figures by module."""

    path: Path
    patch: Patch
    figures: Mapping[str, Figures]

    def as_dict(self) -> dict[str, Any]:
        """As ``patcher import --json`` prints it."""
        modules = {
            name: {
                "kind": delta.kind,
                "rank": delta.rank,
                "error": self.figures[name].error,
                "rounded_error": self.figures[name].rounded_error,
            }
            for name, delta in self.patch.deltas.items()
        }
        return {
            "id": self.patch.id,
            "path": str(self.path),
            "bytes": len(self.patch.data),
            "modules": modules,
        }


def reason_against(module: str) -> str | None:
    """Why an engine couldn't patch the module of that name; None where it could."""
    _, found, member = f"{module}.".partition(".experts.")
    if found and member != "down_proj.":
        return "is a mixture's, of which only all experts' down_proj at once can be patched"
    if module.rpartition(".")[2] in _FUSED:
        return "is served fused with others"
    if not _LAYER.search(module):
        return "is not in a layer"
    return None


def named(names: Sequence[str]) -> str:
    """Names for a message, the first of many."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def figures(wanted: torch.Tensor, base: torch.Tensor, delta: Delta) -> Figures:
    """The figures of ``delta`` on ``base``.

    Args:
        wanted: ``[d_out, d_in]`` float64, what the weight is to be before it is rounded.
        base: the same in the served dtype.

    Raises:
        ModelError: the folded weight, or the wanted one, is not finite.
    """
    size = (wanted - base.double()).norm().clamp(min=torch.finfo(torch.float64).tiny)
    exact = delta.to_torch()
    left, right = exact.left.double(), exact.right.double()
    if exact.kind == "multiplicative":
        right = right @ base.double()
    served = fold(base, [exact])
    off = served.double() - wanted
    found = Figures(
        float((base.double() + left @ right - wanted).norm() / size), float(off.norm() / size)
    )
    if not all(torch.tensor(found).isfinite()):
        raise ModelError(
            f"The edited weights are not finite in {str(base.dtype).removeprefix('torch.')}.",
            "Mend them, or import for a wider dtype: --dtype.",
        )
    return found


def write_patch(
    checkpoint: Checkpoint,
    output: str | os.PathLike[str],
    *,
    method: str,
    hyperparameters: Mapping[str, Any],
    title: str,
    bases: Mapping[str, ModuleBase],
    deltas: Mapping[str, Delta],
    found: Mapping[str, Figures],
) -> Imported:
    """Write the patch. It names no request: nobody's forget set is known here.

    Raises:
        ModelError: it would be larger than the format allows.
        InvalidPatchError: it breaks another bound of the format.
        UsageError: the place, or the owner's salt, can't be written.
    """
    _check_size(deltas)
    manifest = Manifest(
        title=title,
        base=Base(model=checkpoint.name, architecture=checkpoint.class_name, modules=dict(bases)),
        method=Method(name=method, hyperparameters=dict(hyperparameters)),
        requests=Requests(count=0, commitment=commitment([], owner_salt())),
        evaluation={
            "modules": {name: one._asdict() for name, one in found.items()},
            "largest": {
                "error": max(one.error for one in found.values()),
                "rounded_error": max(one.rounded_error for one in found.values()),
            },
        },
    )
    patch = Patch.build(manifest, deltas)
    patch.write(output)
    return Imported(Path(output), patch, found)


def check_wishes(output: str | os.PathLike[str], title: str | None) -> None:
    """Fail before the work where the patch file couldn't be written.

    Raises:
        UsageError: its folder isn't there, or the title can't stand in a manifest.
    """
    if not Path(output).absolute().parent.is_dir():
        raise UsageError(
            f"There is no folder {Path(output).absolute().parent}.", "Make it, or name another."
        )
    check_title(title)


def _check_size(deltas: Mapping[str, Delta]) -> None:
    """Raise ModelError where the factors, in float32, are more than a patch file may hold."""
    size = sum(delta.left.nbytes + delta.right.nbytes for delta in deltas.values())
    if size > MAX_FILE_BYTES:
        raise ModelError(
            f"The patch would be larger than a patch file may be, {MAX_FILE_BYTES} bytes.",
            "Import a lower rank (--diff with --rank), or fewer modules at a time.",
        )
