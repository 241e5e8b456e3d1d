"""The difference of two checkpoints as a patch."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from ..errors import ModelError, UsageError
from ..patch import module_base
from ..unlearn.progress import Progress, Silent
from .checkpoints import FLOATS, Checkpoint, open_checkpoint
from .factors import factored
from .importing import Imported, check_wishes, figures, named, reason_against, write_patch

_EXPERT = re.compile(r"(?P<mixture>.+\.experts)\.\d+\.(?P<inner>.+)\.weight")
# Constants that some programs save with the weights and others make again.
_CONSTANT = re.compile(r".*(\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)")


def from_checkpoints(
    base: str | Path,
    edited: str | Path,
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    dtype: str = "auto",
    title: str | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Write a patch that makes of ``base`` what ``edited`` is, as near as its rank comes.

    Per changed weight the smallest rank whose rest can't be told from the rounding of
    ``edited`` (:func:`patcher.export.factors.factored`); multiplicative where that does and
    is smaller, else additive. What remains is in the manifest's ``evaluation``.

    Args:
        rank: this one instead, for every weight that has as much.
        dtype: what the model is served in; ``auto`` as for ``compute``, by ``base``.

    Raises:
        ModelError: a checkpoint can't be read, they are of different models, or equal, or
            differ where no patch can.
        UsageError: an unknown dtype, a rank below 1, or the place can't be written.
        InvalidPatchError: the patch would break a bound of the format.
    """
    told = progress or Silent()
    if rank is not None and rank < 1:
        raise UsageError(f"A rank is at least 1, not {rank}.", "Leave out --rank, or raise it.")
    check_wishes(output, title)
    old, new = open_checkpoint(base), open_checkpoint(edited)
    served = old.served(dtype)
    names = _changed(old, new, served, told)
    bases, deltas, found = {}, {}, {}
    told.start("factoring", len(names))
    for done, name in enumerate(names, 1):
        weight, wanted = _weights(old, new, name)
        was, grain = weight.to(served).contiguous(), _grain(wanted)
        delta = factored(wanted.double(), weight.double(), grain, rank)
        bases[name], deltas[name] = module_base(was), delta
        found[name] = figures(wanted.double(), was, delta)
        told.step(done, f"{name}: rank {delta.rank}")
    told.finish()
    return write_patch(
        old,
        output,
        method="import-diff",
        hyperparameters={"edited": new.name, "rank": rank or "auto"},
        title=title or "An imported difference",
        bases=bases,
        deltas=deltas,
        found=found,
    )


def _changed(
    old: Checkpoint, new: Checkpoint, served: torch.dtype, progress: Progress
) -> list[str]:
    """The modules whose weights differ as they are served.

    Raises ModelError where something else differs, or nothing does.
    """
    if old.config.model_type != new.config.model_type:
        raise ModelError(
            f"The checkpoints are of different models: {old.config.model_type} and"
            f" {new.config.model_type}.",
            "Give a checkpoint and an edited copy of it.",
        )
    first, second = old.by_module_name, new.by_module_name
    apart = [n for n in sorted(first.keys() ^ second.keys()) if not _CONSTANT.fullmatch(n)]
    both = sorted(first.keys() & second.keys())
    changed: dict[str, None] = {}
    refused = [f"{name} (only in one)" for name in apart]
    progress.start("comparing", len(both))
    for done, name in enumerate(both, 1):
        if not _same(old, first[name], new, second[name], served):
            module = _module(name)
            reason = _reason_against(old, first[name], new, second[name], module)
            if reason is None:
                changed[module] = None
            else:
                refused.append(f"{name} ({reason})")
        progress.step(done)
    progress.finish()
    if refused:
        raise ModelError(
            f"The checkpoints differ where no patch can: {named(refused)}.",
            "Edit output projections (down_proj, o_proj) alone, or serve the edited checkpoint.",
        )
    if not changed:
        raise ModelError(
            "The checkpoints are the same as they are served.",
            "Give the edited one second; --dtype float32 where the edit is smaller than bfloat16.",
        )
    return list(changed)


def _same(old: Checkpoint, first: str, new: Checkpoint, second: str, served: torch.dtype) -> bool:
    one, other = old.tensor(first), new.tensor(second)
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype and torch.equal(one, other):
        return True
    if old.tensors[first].dtype not in FLOATS or new.tensors[second].dtype not in FLOATS:
        return False
    return torch.equal(one.to(served), other.to(served))


def _module(name: str) -> str:
    """The module that a tensor of that name belongs to; a mixture's experts are one."""
    expert = _EXPERT.fullmatch(name)
    return f"{expert['mixture']}.{expert['inner']}" if expert else name.removesuffix(".weight")


def _reason_against(
    old: Checkpoint, first: str, new: Checkpoint, second: str, module: str
) -> str | None:
    here, there = old.tensors[first], new.tensors[second]
    experts = module.rpartition(".")[0].endswith(".experts")
    if here.shape != there.shape:
        return f"of another shape, {here.shape} and {there.shape}"
    matrix = len(here.shape) == 2 or (experts and len(here.shape) == 3)
    if here.dtype not in FLOATS or not matrix:
        return "no matrix"
    if not experts and not first.endswith(".weight"):
        return "no weight"
    return reason_against(module)


def _weights(old: Checkpoint, new: Checkpoint, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    weight, wanted = old.weight(name), new.weight(name)
    assert weight is not None  # both were just compared
    assert wanted is not None
    if not (weight.isfinite().all() and wanted.isfinite().all()):
        raise ModelError(f"{name} has values that are not finite.", "Mend the checkpoint.")
    return weight, wanted


def _grain(weight: torch.Tensor) -> torch.dtype:
    """The coarsest dtype that holds all the values: what they were rounded to last."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(weight.to(dtype).to(weight.dtype), weight):
            return dtype
    return weight.dtype
