"""A low-rank delta on a weight, and what fits what."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Kind = Literal["multiplicative", "additive"]


class LowRank(NamedTuple):
    """One delta on a weight ``W [d_out, d_in]``.

    ``multiplicative``: ``W' = (I + left right) W``, left ``[d_out, r]``, right ``[r, d_out]``.
    ``additive``: ``W' = W + left right``, left ``[d_out, r]``, right ``[r, d_in]``.
    """

    kind: Kind
    left: torch.Tensor
    right: torch.Tensor

    @property
    def rank(self) -> int:
        """The inner dimension ``r``."""
        return self.left.shape[1]

    def columns(self, start: int, stop: int) -> LowRank:
        """The part of this delta that acts on ``W[:, start:stop]``; a view."""
        if self.kind == "multiplicative":
            return self  # a left factor acts on every column alike
        return self._replace(right=self.right[:, start:stop])


def check_delta(delta: LowRank, d_out: int, d_in: int, name: str = "delta") -> None:
    """Raise ValueError where ``delta`` does not fit a weight ``[d_out, d_in]``."""
    if delta.kind not in ("multiplicative", "additive"):
        raise ValueError(f"{name} is of unknown kind {delta.kind!r}")
    if delta.left.ndim != 2 or delta.right.ndim != 2:
        raise ValueError(f"{name} needs two matrices")
    if not (delta.left.is_floating_point() and delta.right.is_floating_point()):
        raise ValueError(f"{name} needs floating dtypes")
    width = d_out if delta.kind == "multiplicative" else d_in
    rank = delta.left.shape[1]
    if tuple(delta.left.shape) != (d_out, rank) or tuple(delta.right.shape) != (rank, width):
        raise ValueError(
            f"{name} ({delta.kind}) is {tuple(delta.left.shape)} by {tuple(delta.right.shape)},"
            f" which does not fit a weight of ({d_out}, {d_in})"
        )
