"""Several patches as one: composed exactly, or at a lower rank with the error that it costs.

A stack's deltas on one module compose to one (``docs/format.md``, "The fold"). A lower rank is
the best one by Eckart and Young in the norm that the statistics give: that of what the delta adds
to the outputs, over the inputs that occur, or without them that of the product ``L R`` alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from ..errors import InvalidPatchError, StackConflictError, UsageError
from .compare import Statistics, check_bases
from .delta import Delta
from .format import Patch
from .manifest import Base, Manifest, Method, Requests, check_title

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Merged:
    """The patch, and per module its rank, the ranks' sum, and the relative error (0: exact)."""

    patch: Patch
    modules: Mapping[str, Mapping[str, float | int]]
    whitened: bool


def merge(
    patches: Sequence[Patch],
    *,
    rank: int | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    title: str | None = None,
) -> Merged:
    """One patch that does what ``patches`` do as a stack, ``patches[0]`` at the bottom.

    Args:
        patches: at least two, of one base.
        rank: at most this on every module; None: exact, up to the rounding to float32.
        statistics: by module, what the error of a lower rank is measured and made small under.
        title: of the new patch.

    Raises:
        UsageError: a title that can't be one, fewer than two, one twice, a multiplicative
            and an additive delta on one module.
        BaseMismatchError: computed on different weights.
        StackConflictError: they may not be in one stack, or not in this order, or one
            conflicts with what another requires.
        InvalidPatchError: together they are beyond a bound on what a patch may be.
    """
    check_title(title)
    _check(patches)
    names = sorted({name for patch in patches for name in patch.deltas})
    deltas: dict[str, Delta] = {}
    told: dict[str, dict[str, float | int]] = {}
    for name in names:
        parts = [patch.deltas[name] for patch in patches if name in patch.deltas]
        base = next(p.manifest.base.modules[name] for p in patches if name in p.deltas)
        deltas[name], error = _one(name, parts, base.shape, rank, (statistics or {}).get(name))
        told[name] = {
            "rank": deltas[name].rank,
            "of": sum(part.rank for part in parts),
            "error": error,
        }
    try:
        manifest = _manifest(patches, rank, title, told, statistics is not None)
    except ValidationError as error:  # each is within bounds, and all of them are not
        wrong = error.errors()[0]
        raise InvalidPatchError(
            f"No manifest can say all of it: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}.",
            "Merge fewer of them.",
        ) from None
    return Merged(Patch.build(manifest, deltas), told, statistics is not None)


def _check(patches: Sequence[Patch]) -> None:
    if len(patches) < 2:
        raise UsageError("There is nothing to merge.", "Name two patches or more.")
    ids = [patch.id for patch in patches]
    for place, patch in enumerate(patches):
        if patch.id in ids[:place]:
            raise UsageError(f"Patch {patch.id[:12]} was given twice.", "Name each once.")
        for lower in patches[:place]:
            check_bases(lower, patch)
        late = [i for i in patch.manifest.requires if i in ids[place:]]
        if late:
            raise StackConflictError(
                f"Patch {patch.id[:12]} requires {late[0][:12]} below it.",
                "Name them in the stack's order, the bottom first.",
            )
        clash = [i for i in patch.manifest.conflicts if i in ids]
        if clash:
            raise StackConflictError(
                f"Patch {patch.id[:12]} conflicts with {clash[0][:12]}.", "Leave one of them out."
            )
    wanted = {one for patch in patches for one in patch.manifest.requires}
    for patch in patches:
        against = [one for one in patch.manifest.conflicts if one in wanted]
        if against:
            raise StackConflictError(
                f"Patch {patch.id[:12]} conflicts with {against[0][:12]}, which another requires.",
                "Leave one of them out.",
            )


def _one(
    name: str,
    parts: Sequence[Delta],
    shape: tuple[int, int],
    rank: int | None,
    statistics: Statistics | None,
) -> tuple[Delta, float]:
    """The composition of a module's deltas, and the relative error of its lower rank."""
    from ..kernels import compose

    kind = parts[0].kind
    if any(part.kind != kind for part in parts):
        raise UsageError(
            f"{name} has a multiplicative and an additive delta; no single one does what they do.",
            "Keep them as a stack, or merge those of one kind.",
        )
    whole = compose([part.to_torch() for part in parts])
    left, right = whole.left.numpy(), whole.right.numpy()
    most = shape[0] if kind == "multiplicative" else min(shape)
    wanted = min(most, left.shape[1] if rank is None else rank)
    error = 0.0
    if wanted < left.shape[1]:
        left, right, error = _lower(left, right, wanted, _root(kind, statistics))
        error = 0.0 if wanted == most else error
    make = Delta.multiplicative if kind == "multiplicative" else Delta.additive
    return make(left, right), error


def _root(kind: str, statistics: Statistics | None) -> Array | None:
    """``S`` with ``S Sᵀ`` the second moment of what a delta's right factor reads."""
    if statistics is None:
        return None
    weight, moment = statistics
    read = weight @ moment @ weight.T if kind == "multiplicative" else moment
    values, vectors = np.linalg.eigh(read)
    root: Array = vectors * np.sqrt(np.maximum(values, 0.0))
    return root


def _lower(left: Array, right: Array, rank: int, root: Array | None) -> tuple[Array, Array, float]:
    """The best ``left right`` of that rank under ``root``, and its relative error.

    ``left right root = U s Vᵀ`` is cut by projecting on the first columns of ``U``: from the
    left, so that ``root`` needs no inverse.
    """
    basis, small = np.linalg.qr(left)
    seen = right if root is None else right @ root
    _, across = np.linalg.qr(seen.T)
    turns, values, _ = np.linalg.svd(small @ across.T)
    kept = turns[:, :rank]
    total = float(np.sum(values**2))
    lost = float(np.sum(values[rank:] ** 2))
    error = math.sqrt(lost / total) if total > 0 else 0.0
    return basis @ kept, kept.T @ small @ right, error


def _manifest(
    patches: Sequence[Patch],
    rank: int | None,
    title: str | None,
    told: Mapping[str, Mapping[str, float | int]],
    whitened: bool,
) -> Manifest:
    ids = [patch.id for patch in patches]
    manifests = [patch.manifest for patch in patches]
    modules = {n: m for one in reversed(manifests) for n, m in one.base.modules.items()}
    chained = "".join(f"{one.requests.commitment}\n" for one in manifests)
    hyperparameters: dict[str, Any] = {
        "of": ids,
        "rank": rank,
        "metric": "statistics" if whitened else "euclidean",
        "error": {name: one["error"] for name, one in told.items()},
    }
    return Manifest(
        title=title or f"Merge of {len(patches)} patches",
        base=Base(
            model=manifests[0].base.model,
            architecture=manifests[0].base.architecture,
            modules=modules,
        ),
        method=Method(name="merge", hyperparameters=hyperparameters),
        requests=Requests(
            count=sum(one.requests.count for one in manifests),
            commitment=hashlib.sha256(chained.encode()).hexdigest(),
        ),
        requires=_others(ids, [i for one in manifests for i in one.requires]),
        conflicts=_others(ids, [i for one in manifests for i in one.conflicts]),
    )


def _others(ids: Sequence[str], named: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one for one in named if one not in ids))
