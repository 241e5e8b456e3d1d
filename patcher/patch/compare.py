"""How much patches will be in each other's way, from the files alone (docs/methods.md).

With ``W' = (I + L R) W`` the rows of ``R`` say *which* outputs a patch acts on, the columns
of ``L`` *what* it writes. Two patches are in each other's way where they act on the same
inputs, or where one acts on what the other writes. An additive delta ``A B`` reads the keys
instead: ``B`` says which, ``A`` what.

All figures are the same for every way of factoring a product ``L R``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import BaseMismatchError, UsageError
from . import norms
from .delta import Delta
from .format import Patch

Array = npt.NDArray[np.float64]

TINY = 1e-9  # of the largest eigenvalue of a Gram matrix of unit rows: below it, no direction
SOME, STRONG = 0.25, 0.5  # interference from which a pair counts as such


class Statistics(NamedTuple):
    """Of one module, float64: ``weight`` ``[d_out, d_in]``, ``moment`` ``E[k kᵀ] [d_in, d_in]``."""

    weight: Array
    moment: Array


@dataclass(frozen=True)
class Shared:
    """Two patches at one module.

    ``overlap``: of the spaces of inputs that they act on, 0 to 1. ``second_on_first``: how
    much the second changes the first's outputs for the first's own inputs, relative to what
    the first changed there, the first beneath; ``first_on_second`` the other way round.
    ``reads``: how much of what the first writes the second acts on, of what it could, 0 to 1.
    None: can't be told without the statistics.
    """

    overlap: float | None
    first_on_second: float | None
    second_on_first: float | None
    reads: float | None


@dataclass(frozen=True)
class Pair:
    """Two patches: indices into the comparison's, the figures by shared module, the sum.

    ``interference``: the root of the mean square overlap over the shared modules, 0 to 1;
    None where none is shared, or none can be told.
    """

    first: int
    second: int
    modules: Mapping[str, Shared]
    interference: float | None
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """As ``patcher compare --json`` writes it, without the patches' names."""
        return {
            "interference": _rounded(self.interference),
            "verdict": self.verdict,
            "modules": {
                name: {key: _rounded(value) for key, value in vars(one).items()}
                for name, one in self.modules.items()
            },
        }


@dataclass(frozen=True)
class Comparison:
    """All pairs of some patches. ``whitened``: by the statistics of a model."""

    patches: tuple[Patch, ...]
    pairs: tuple[Pair, ...]
    whitened: bool = field(default=False)


def compare(
    patches: Sequence[Patch], statistics: Mapping[str, Statistics] | None = None
) -> Comparison:
    """Predict for every pair how much the two are in each other's way.

    Args:
        patches: at least two, each once; of a pair the first is taken as the lower one.
        statistics: by module; without them inputs are measured in the plain Euclidean way.

    Raises:
        UsageError: fewer than two, or one twice.
        BaseMismatchError: two were computed on different weights of one module.
    """
    if len(patches) < 2:
        raise UsageError("There is nothing to compare.", "Name two patches or more.")
    ids = [patch.id for patch in patches]
    twice = next((one for one in ids if ids.count(one) > 1), None)
    if twice is not None:
        raise UsageError(
            f"Patch {twice[:12]} was given twice.",
            "A stack takes each patch once; name different ones.",
        )
    pairs = [
        _pair(i, j, patches[i], patches[j], statistics or {})
        for i, j in combinations(range(len(patches)), 2)
    ]
    return Comparison(tuple(patches), tuple(pairs), statistics is not None)


def _pair(
    i: int, j: int, first: Patch, second: Patch, statistics: Mapping[str, Statistics]
) -> Pair:
    check_bases(first, second)
    names = sorted(first.deltas.keys() & second.deltas.keys())
    modules = {
        name: _shared(first.deltas[name], second.deltas[name], statistics.get(name))
        for name in names
    }
    known = [one.overlap for one in modules.values() if one.overlap is not None]
    total = math.sqrt(sum(value**2 for value in known) / len(known)) if known else None
    return Pair(i, j, modules, total, _verdict(first, second, modules, total))


def check_bases(first: Patch, second: Patch) -> None:
    """Raise :class:`BaseMismatchError` where two patches name different weights of one module."""
    one, other = first.manifest.base.modules, second.manifest.base.modules
    for name in sorted(one.keys() & other.keys()):
        same = (one[name].shape, one[name].dtype, one[name].digest) == (
            other[name].shape,
            other[name].dtype,
            other[name].digest,
        )
        if not same:
            raise BaseMismatchError(
                f"Patches {first.id[:12]} and {second.id[:12]} were computed on different"
                f" weights of {name}.",
                "They can never be in one stack; take patches of one model and revision.",
            )


def _verdict(
    first: Patch, second: Patch, modules: Mapping[str, Shared], total: float | None
) -> str:
    for upper, lower in ((first, second), (second, first)):
        if lower.id in upper.manifest.requires:
            return "on top of the other"
        if lower.id in upper.manifest.conflicts:
            return "conflict"
    if not modules:
        return "no shared module"
    if total is None:
        return "unknown"
    return "strong" if total >= STRONG else "some" if total >= SOME else "independent"


class _Side(NamedTuple):
    """One delta in the space that both are compared in.

    ``gate`` ``[r, q]``: of what it reads. ``left`` ``[d_out, r]``: what it writes.
    ``above`` ``[r, d_out]``: how it reads what a patch beneath wrote; nothing if additive.
    ``rows`` ``[q, r']``: a basis of the gate's rows, orthonormal in the metric ``M``.
    ``inputs`` ``[q, r']``: ``M rows``, the likeliest inputs that it acts on. ``writes``
    ``[d_out, r']``: what it adds to the output for each of them.
    """

    gate: Array
    left: Array
    above: Array
    rows: Array
    inputs: Array
    writes: Array


def _shared(first: Delta, second: Delta, statistics: Statistics | None) -> Shared:
    if first.kind != second.kind and statistics is None:
        return Shared(None, None, None, None)
    keys = "additive" in (first.kind, second.kind)
    metric = _metric(statistics, keys)
    one, other = (_side(delta, statistics, keys, metric) for delta in (first, second))
    return Shared(
        _overlap(one, other),
        _first_on_second(one, other),
        _second_on_first(one, other),
        _reads(one, other),
    )


def _metric(statistics: Statistics | None, keys: bool) -> Array | None:
    """The second moment of what gates read: of the keys, or of the outputs ``W C Wᵀ``."""
    if statistics is None:
        return None
    weight, moment = statistics
    return moment if keys else weight @ moment @ weight.T


def _side(delta: Delta, statistics: Statistics | None, keys: bool, metric: Array | None) -> _Side:
    left, right = delta.left.astype(np.float64), delta.right.astype(np.float64)
    multiplicative = delta.kind == "multiplicative"
    gate = right
    if keys and multiplicative:
        assert statistics is not None  # kinds differ, which is told apart before
        gate = right @ statistics.weight
    spread = gate.T if metric is None else metric @ gate.T
    size = np.sqrt(np.maximum(np.einsum("rq,qr->r", gate, spread), 1e-300))
    values, vectors = np.linalg.eigh((gate @ spread) / np.outer(size, size))
    usable = values > TINY * max(values[-1], 1e-300)
    turn = vectors[:, usable] / np.sqrt(values[usable]) / size[:, None]
    above = right if multiplicative else np.zeros((len(right), len(left)))
    inputs = spread @ turn
    return _Side(gate, left, above, gate.T @ turn, inputs, left @ (gate @ inputs))


def _overlap(one: _Side, other: _Side) -> float:
    """Root of the mean squared cosine of the angles between what the two act on."""
    cosines = one.rows.T @ other.inputs
    least = max(1, min(cosines.shape))
    return math.sqrt(min(1.0, float(np.sum(cosines**2)) / least))


def _second_on_first(first: _Side, second: _Side) -> float | None:
    """What the second adds on top, at the first's inputs, over what the first adds there."""
    seen = second.gate @ first.inputs + second.above @ first.writes
    return _ratio(second.left @ seen, first.writes)


def _first_on_second(first: _Side, second: _Side) -> float | None:
    """What the first changes from beneath, at the second's inputs, over what that adds."""
    beneath = first.left @ (first.gate @ second.inputs)
    return _ratio(beneath + second.left @ (second.above @ beneath), second.writes)


def _reads(first: _Side, second: _Side) -> float | None:
    """How much the second acts on what the first writes, of the most that it could."""
    if not second.above.any():
        return 0.0
    most = norms.spectral(second.left, second.above)
    found = _ratio(second.left @ (second.above @ first.writes), most * first.writes)
    return None if found is None else min(1.0, found)


def _ratio(above: Array, below: Array) -> float | None:
    size = float(np.linalg.norm(below))
    return float(np.linalg.norm(above)) / size if size > 0 else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
