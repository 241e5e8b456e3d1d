"""Folders that are there whole or not at all, and the checks that come before one is made."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..engine.stack import admit
from ..errors import BaseMismatchError, UsageError
from ..patch import ModuleBase, Patch, check_module
from ..patch.files import sync_folder
from .checkpoints import Checkpoint


@contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A sibling to write into, that becomes ``target`` at the end; nothing is left of a failure.

    Raises:
        UsageError: ``target`` is there and not an empty folder, or the place can't be written.
    """
    path = Path(os.path.realpath(target))
    _check_free(path)
    sibling = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        sibling.mkdir()
        try:
            yield sibling
            for file in sibling.iterdir():
                _sync(file)
            sync_folder(sibling)
            os.replace(sibling, path)  # over an empty folder, or nothing; else it fails
        except BaseException:
            shutil.rmtree(sibling, ignore_errors=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise UsageError(
            f"Can't write {os.fspath(target)}: {error.strerror or error}.",
            "Choose a place whose folder exists, can be written and has room.",
        ) from None


def _check_free(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        return
    if os.path.lexists(path):
        raise UsageError(
            f"{path} is there already.", "Name a folder that doesn't exist yet, or an empty one."
        )


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_stack(paths: Sequence[str | os.PathLike[str] | Patch]) -> list[Patch]:
    """The patches, the bottom of the stack first, if an engine would take them so.

    Raises:
        UsageError: none.
        InvalidPatchError: a file is damaged.
        StackConflictError: a patch twice, without what it requires, or beside a conflicting one.
    """
    patches = [one if isinstance(one, Patch) else Patch.read(one) for one in paths]
    if not patches:
        raise UsageError("There is nothing to export.", "Name a patch file, or several.")
    admit([patch.id for patch in patches], {patch.id: patch.manifest for patch in patches})
    return patches


def bases_of(patches: Sequence[Patch]) -> Mapping[str, ModuleBase]:
    """What the modules were before, by name.

    Raises:
        BaseMismatchError: two patches were computed on different weights of a module.
    """
    found: dict[str, ModuleBase] = {}
    for patch in patches:
        for name, base in patch.manifest.base.modules.items():
            other = found.setdefault(name, base)
            if (other.digest, other.dtype, other.shape) != (base.digest, base.dtype, base.shape):
                raise BaseMismatchError(
                    f"The patches were computed on different weights of {name}.",
                    "Name patches of one model, revision and dtype.",
                )
    return dict(sorted(found.items()))


def base_weight(checkpoint: Checkpoint, name: str, base: ModuleBase) -> torch.Tensor:
    """The module's weight ``[d_out, d_in]``, in the dtype that the patch was computed for.

    Raises:
        BaseMismatchError: the checkpoint has other weights, or no such module.
    """
    weight = checkpoint.weight(name)
    if weight is None:
        raise BaseMismatchError(
            f"The model has no {name}, which the patch changes.",
            "Give the model that the patch was computed on.",
        )
    served = weight.to(getattr(torch, base.dtype)).contiguous()
    check_module(name, base, served)
    return served
