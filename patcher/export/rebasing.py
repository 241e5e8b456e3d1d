"""A patch for the same weights under other names, or served in another dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import BaseMismatchError, StackConflictError, UsageError
from ..kernels import digest
from ..patch import Base, ModuleBase, Patch, module_base
from .checkpoints import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Rebased:
    """The new patch, and per module of the old one its name in the new."""

    patch: Patch
    names: dict[str, str]
    dtype: str


def rebase(patch: Patch, model: str | Path, *, dtype: str = "auto") -> Rebased:
    """``patch`` for ``model``, whose weights must be those that it was computed on.

    They may have other names there, and be stored in another dtype, so long as they are the
    patch's base once they are rounded to the dtype that it was computed for.

    Args:
        patch: which requires no other one.
        model: a directory or a hub id.
        dtype: what the model will be served in; ``auto``: what vLLM makes of it.

    Raises:
        BaseMismatchError: the model has other weights.
        StackConflictError: the patch names others, whose ids would change too.
        UsageError: it fits the model as it is, or an unknown dtype.
        ModelError: the model can't be read.
    """
    others = (*patch.manifest.requires, *patch.manifest.conflicts)
    if others:
        raise StackConflictError(
            f"The patch names {others[0][:12]}, which will be another file for that model.",
            "Merge the stack to one patch first (`patcher merge`), and rebase that.",
        )
    checkpoint = open_checkpoint(model)
    served = checkpoint.served(dtype)
    names: dict[str, str] = {}
    modules: dict[str, ModuleBase] = {}
    for name, base in patch.manifest.base.modules.items():
        found = _found(checkpoint, name, base)
        weight = checkpoint.weight(found)
        assert weight is not None
        names[name] = found
        modules[found] = module_base(weight.to(served).contiguous())
    told = str(served).removeprefix("torch.")
    if modules == patch.manifest.base.modules:
        raise UsageError(
            f"The patch fits {checkpoint.name} as it is, served in {told}.",
            "Apply it; or name another model, or another --dtype.",
        )
    return Rebased(_moved(patch, checkpoint, names, modules), names, told)


def _found(checkpoint: Checkpoint, name: str, base: ModuleBase) -> str:
    """The module of the checkpoint with exactly those weights: by its name, else by them."""
    if _is(checkpoint, name, base):
        return name
    same = [other for other in _modules(checkpoint) if _is(checkpoint, other, base)]
    if len(same) != 1:
        why = "several with the weights" if same else "no weights like those"
        raise BaseMismatchError(
            f"The model has {why} of {name} in {base.dtype}.",
            "Only names and dtype may differ: take the checkpoint that the patch was computed on, "
            "as it was published, or compute the patch again.",
        )
    return same[0]


def _is(checkpoint: Checkpoint, name: str, base: ModuleBase) -> bool:
    if not _fits(checkpoint, name, base):
        return False
    weight = checkpoint.weight(name)
    assert weight is not None
    return digest(weight.to(getattr(torch, base.dtype)).contiguous()) == base.digest


def _fits(checkpoint: Checkpoint, name: str, base: ModuleBase) -> bool:
    """Whether the module's tensors have as many values; told without reading them."""
    parts = [checkpoint.tensors[part] for part in checkpoint.parts(name)]
    values = sum(int(torch.Size(part.shape).numel()) for part in parts)
    return bool(parts) and values == base.shape[0] * base.shape[1]


def _modules(checkpoint: Checkpoint) -> Iterator[str]:
    for name in checkpoint.by_module_name:
        if name.endswith(".weight"):
            yield name.removesuffix(".weight")


def _moved(
    patch: Patch, checkpoint: Checkpoint, names: dict[str, str], modules: dict[str, ModuleBase]
) -> Patch:
    manifest = patch.manifest
    hyperparameters = {**manifest.method.hyperparameters, "rebased_from": patch.id}
    moved = manifest.model_copy(
        update={
            "base": Base(
                model=checkpoint.name, architecture=checkpoint.class_name, modules=modules
            ),
            "method": manifest.method.model_copy(update={"hyperparameters": hyperparameters}),
            # What was measured, was measured on the other one.
            "evaluation": None,
        }
    )
    return Patch.build(moved, {names[name]: delta for name, delta in patch.deltas.items()})
