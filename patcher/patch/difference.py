"""What differs between two patch files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import norms
from .delta import Delta
from .format import Patch


@dataclass(frozen=True)
class ModuleDifference:
    """One module of two patches; None where a patch doesn't change it.

    ``distance``: the norm of the difference of the two products, relative to the larger one's:
    0 for the same edit, however it is factored; None where that can't be told (two kinds, two
    shapes, or one patch alone). ``same_base``: whether both name the same weights.
    """

    first: dict[str, Any] | None
    second: dict[str, Any] | None
    distance: float | None
    same_base: bool | None

    @property
    def same(self) -> bool:
        """Whether both do the same to the same weights, and store it alike."""
        stored = [one and one["dtype"] for one in (self.first, self.second)]
        return self.distance == 0 and self.same_base is True and stored[0] == stored[1]


@dataclass(frozen=True)
class Difference:
    """``fields``: those of the manifests that differ, by dotted name: one patch's, the other's."""

    fields: dict[str, tuple[Any, Any]]
    modules: dict[str, ModuleDifference]

    @property
    def same(self) -> bool:
        """Whether they say the same, and do the same to the same weights, stored alike."""
        return not self.fields and all(one.same for one in self.modules.values())


def difference(first: Patch, second: Patch) -> Difference:
    """Compare manifests field by field, and modules by what they do to a weight."""
    told = [_flat(patch.manifest.model_dump(mode="json", exclude={"base": {"modules"}}))
            for patch in (first, second)]  # fmt: skip
    names = sorted(told[0].keys() | told[1].keys())
    fields = {
        name: (told[0].get(name), told[1].get(name))
        for name in names
        if told[0].get(name) != told[1].get(name)
    }
    modules = sorted(first.deltas.keys() | second.deltas.keys())
    return Difference(fields, {name: _module(name, first, second) for name in modules})


def _module(name: str, first: Patch, second: Patch) -> ModuleDifference:
    one, other = first.deltas.get(name), second.deltas.get(name)
    bases = [patch.manifest.base.modules.get(name) for patch in (first, second)]
    same = bases[0] == bases[1] if all(bases) else None
    return ModuleDifference(_told(one), _told(other), _distance(one, other), same)


def _told(delta: Delta | None) -> dict[str, Any] | None:
    if delta is None:
        return None
    return {"kind": delta.kind, "rank": delta.rank, "norm": delta.norm, "dtype": delta.dtype}


def _distance(one: Delta | None, other: Delta | None) -> float | None:
    if one is None or other is None or one.kind != other.kind:
        return None
    if (one.left.shape[0], one.right.shape[1]) != (other.left.shape[0], other.right.shape[1]):
        return None
    if np.array_equal(one.left, other.left) and np.array_equal(one.right, other.right):
        return 0.0
    left = np.hstack([one.left, -other.left])
    size = max(one.norm, other.norm)
    return norms.frobenius(left, np.vstack([one.right, other.right])) / size if size else 0.0


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    rows: dict[str, Any] = {}
    for name, one in value.items():
        rows |= _flat(one, f"{prefix}.{name}" if prefix else name)
    return rows
