"""Patches folded into a checkpoint's files: a model that other programs load.

A shard is copied as it is, and the bytes of the folded weights are written over those of the
base: everything else stays bit for bit, and one weight at a time is in memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, NumericalError
from ..kernels import fold
from ..patch import ModuleBase, Patch, tool
from ..unlearn.progress import Progress, Silent
from .checkpoints import FLOATS, INDEX, Checkpoint, Stored, open_checkpoint
from .folders import base_weight, bases_of, new_folder, read_stack

RECORD = "patcher.json"
# What holds weights in another form, which would still be the base's.
_WEIGHTS = {
    ".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".ot", ".pickle", ".pkl",
    ".pt", ".pth", ".safetensors", ".tflite",
}  # fmt: skip


@dataclass(frozen=True)
class Merged:
    """A checkpoint that was written.

    ``left_out``: files and folders of the base's that were not copied, since they hold, or may
    hold, weights that the patches don't change.
    """

    path: Path
    patches: tuple[str, ...]
    modules: tuple[str, ...]
    bytes: int
    left_out: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As ``patcher export --checkpoint --json`` prints it."""
        return {
            "kind": "checkpoint",
            "path": str(self.path),
            "patches": list(self.patches),
            "modules": list(self.modules),
            "bytes": self.bytes,
            "left_out": list(self.left_out),
        }


def to_checkpoint(
    patches: Sequence[str | os.PathLike[str] | Patch],
    target: str | os.PathLike[str],
    model: str | Path,
    progress: Progress | None = None,
) -> Merged:
    """Write ``model`` with the patches folded in, the bottom of the stack first.

    The weights are those that an engine serves with that stack, to the bit. ``patcher.json``
    beside them says which patches they hold.

    Args:
        target: a folder that doesn't exist yet, or an empty one.
        model: a directory or a hub id.

    Raises:
        UsageError: no patch, or ``target`` can't be written.
        InvalidPatchError: a file is damaged.
        StackConflictError: an engine wouldn't take these patches in this order.
        BaseMismatchError: a patch was computed on other weights.
        ModelError: the checkpoint can't be read, or can't hold the folded weights exactly.
        NumericalError: a folded weight is not finite.
    """
    told = progress or Silent()
    stack = read_stack(patches)
    bases = bases_of(stack)
    checkpoint = open_checkpoint(model)
    told.start("checking the base", len(bases))
    for done, (name, base) in enumerate(bases.items(), 1):
        base_weight(checkpoint, name, base)
        _check_holds(checkpoint, name, base)
        told.step(done)
    told.finish()
    with new_folder(target) as folder:
        left_out = _copy(checkpoint, folder, told)
        _fold_all(checkpoint, folder, stack, bases, told)
        ids = tuple(patch.id for patch in stack)
        record = {"base": checkpoint.name, "patches": ids, "modules": list(bases), "tool": tool()}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
    return Merged(Path(target), ids, tuple(bases), size, left_out)


def _check_holds(checkpoint: Checkpoint, name: str, base: ModuleBase) -> None:
    """The folded weight is rounded to the served dtype; the file must hold that exactly."""
    stored = checkpoint.tensors[checkpoint.parts(name)[0]].dtype
    if FLOATS[stored] not in (torch.float32, getattr(torch, base.dtype)):
        raise ModelError(
            f"{name} is stored as {stored}, which can't hold weights that are served in"
            f" {base.dtype}.",
            "Save the checkpoint in the dtype that it is served in, and export from that.",
        )


def _copy(checkpoint: Checkpoint, folder: Path, progress: Progress) -> tuple[str, ...]:
    """Copy the shards, and all beside them that is no weights; the names of what stayed behind."""
    there = sorted(one for one in checkpoint.folder.iterdir() if not one.name.startswith("."))
    wanted = [path for path in there if _goes_along(checkpoint, path)]
    progress.start("copying", len(wanted))
    for done, path in enumerate(wanted, 1):
        shutil.copyfile(path, folder / path.name)
        progress.step(done)
    progress.finish()
    return tuple(path.name + "/" * path.is_dir() for path in there if path not in wanted)


def _goes_along(checkpoint: Checkpoint, path: Path) -> bool:
    if path in checkpoint.shards or path.name == INDEX:
        return True
    inner = Path(path.name.removesuffix(".index.json"))
    return path.is_file() and inner.suffix.lower() not in _WEIGHTS


def _fold_all(
    checkpoint: Checkpoint,
    folder: Path,
    stack: Sequence[Patch],
    bases: Mapping[str, ModuleBase],
    progress: Progress,
) -> None:
    progress.start("folding", len(bases))
    for done, (name, base) in enumerate(bases.items(), 1):
        deltas = [patch.deltas[name].to_torch() for patch in stack if name in patch.deltas]
        weight = fold(base_weight(checkpoint, name, base), deltas)
        if not weight.isfinite().all():
            raise NumericalError(
                f"Folded, {name} has values that are not finite in {base.dtype}.",
                "Leave out the patch that makes them so; an engine refuses it too.",
            )
        for part, tensor in checkpoint.taken_apart(name, weight):
            _write_over(checkpoint.tensors[part], folder, tensor)
        progress.step(done)
    progress.finish()


def _write_over(at: Stored, folder: Path, tensor: torch.Tensor) -> None:
    values = tensor.to(FLOATS[at.dtype]).contiguous()
    with (folder / at.file.name).open("r+b") as file:
        file.seek(at.begin)
        file.write(values.view(torch.uint8).numpy().data)
