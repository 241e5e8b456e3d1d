"""Several deltas as one."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import groupby

import torch

from .low_rank import LowRank


@torch.no_grad()
def compose(deltas: Sequence[LowRank]) -> LowRank:
    """One delta that does what ``deltas`` do in order, ``deltas[0]`` first.

    ``(I + L_k R_k) … (I + L_1 R_1) = I + L R'`` with ``L = [L_1 … L_k]`` and
    ``R'_i = R_i + Σ_{j<i} R_i L_j R'_j``, so ``R' = (I − T)⁻¹ R`` with ``T`` the blocks of ``R L``
    below the diagonal: two products and a triangular solve, however many deltas there are
    (as the WY form of Householder reflections: Bischof & Van Loan 1987). Additive ones
    are laid side by side. The rank of the result is the sum of the ranks. It is
    float64; whoever stores it narrower rounds it, so a fold of the stored
    composition may differ from the fold of the parts in a last bit.

    Args:
        deltas: at least one; all of one kind, for one shape of weight.

    Raises:
        ValueError: none given, kinds mixed (a multiplicative delta on top of an
            additive one is no longer of either form), or shapes that don't fit.
    """
    if not deltas:
        raise ValueError("nothing to compose")
    kinds = {delta.kind for delta in deltas}
    if len(kinds) > 1:
        raise ValueError("cannot compose multiplicative with additive deltas")
    shapes = {(delta.left.shape[0], delta.right.shape[1]) for delta in deltas}
    if len(shapes) > 1:
        raise ValueError(f"cannot compose deltas for different shapes: {sorted(shapes)}")
    device = deltas[0].left.device
    left = _side_by_side([delta.left for delta in deltas], device, dim=1)
    right = _side_by_side([delta.right for delta in deltas], device, dim=0)
    kind = deltas[0].kind
    if kind == "additive" or len(deltas) == 1:
        return LowRank(kind, left, right)
    block = torch.repeat_interleave(torch.tensor([delta.rank for delta in deltas], device=device))
    earlier = block[:, None] > block[None, :]
    system = (right @ left).mul_(earlier).neg_()
    # Transposed, for the solver works in columns and both need rows.
    solved = torch.linalg.solve_triangular(
        system.t(), right.t(), upper=True, left=False, unitriangular=True
    ).t()
    return LowRank(kind, left, solved)


def _side_by_side(factors: list[torch.Tensor], device: torch.device, dim: int) -> torch.Tensor:
    """In float64; put together first, for that is one conversion and less to move."""
    moved = [factor.detach().to(device) for factor in factors]
    return torch.cat(moved, dim).to(torch.float64)


def dense_is_less(rank: int, d_out: int, d_in: int) -> bool:
    """Whether ``D`` held dense is less work than factors of a summed rank of ``rank``.

    ``4 d_out r`` operations for each of ``d_in`` columns, or ``2 d_out²`` and ``2 d_out² r`` once.
    """
    return rank * (2 * d_in - d_out) > d_out * d_in


class Affine:
    """What a stack of deltas of both kinds does: ``W' = D W + A B``.

    ``D`` is ``I + L R``, or ``dense`` where :func:`dense_is_less`. One multiplicative delta
    alone stays as it is, in its own dtype.

    Args:
        deltas: at least one, ``deltas[0]`` first, all on one device.
        d_out: rows of the weight.
        d_in: its columns, or those of the shard that is to be folded.
    """

    def __init__(self, deltas: Sequence[LowRank], d_out: int, d_in: int) -> None:
        ranks = [delta.rank for delta in deltas if delta.kind == "multiplicative"]
        self.is_dense = dense_is_less(sum(ranks), d_out, d_in)
        empty = deltas[0].left.new_empty(0, dtype=torch.float64)
        self.factors = LowRank("multiplicative", empty.view(d_out, 0), empty.view(0, d_out))
        self.added = LowRank("additive", empty.view(d_out, 0), empty.view(0, d_in))
        self.dense = torch.eye(
            d_out if self.is_dense else 0, dtype=torch.float64, device=empty.device
        )
        for kind, run in groupby(deltas, key=lambda delta: delta.kind):
            if kind == "additive":
                self.added = _then(self.added, list(run))
                continue
            for group in _groups(list(run), d_out // 2) if self.is_dense else [list(run)]:
                self._multiply(group)

    def _multiply(self, group: list[LowRank]) -> None:
        if self.added.rank:
            self.added = self.added._replace(left=_applied(compose(group), self.added.left))
        if self.is_dense:
            self.dense = _applied(compose(group), self.dense)
        else:
            self.factors = _then(self.factors, group)

    def columns(self, columns: slice) -> Affine:
        """The same for those columns of the weight."""
        part = copy(self)
        part.added = self.added.columns(columns.start, columns.stop)
        return part

    def left(self) -> torch.Tensor:
        """``[L A]``, a view where one of them is empty."""
        held = [part.left for part in (self.factors, self.added) if part.rank]
        return held[0] if len(held) == 1 else torch.cat(held, 1)


def _then(first: LowRank, more: list[LowRank]) -> LowRank:
    if first.rank:
        return compose([first, *more])
    return more[0] if len(more) == 1 else compose(more)


def _applied(delta: LowRank, to: torch.Tensor) -> torch.Tensor:
    """``(I + L R) to``, in float64."""
    wide = to.to(torch.float64)
    return torch.addmm(wide, delta.left, delta.right @ wide)


def _groups(deltas: list[LowRank], rank: int) -> list[list[LowRank]]:
    """Neighbours together, up to a summed rank: solving is cubic in it, so not all at once."""
    groups: list[list[LowRank]] = []
    held = rank + 1
    for delta in deltas:
        if held + delta.rank > rank:
            groups.append([])
            held = 0
        groups[-1].append(delta)
        held += delta.rank
    return groups
