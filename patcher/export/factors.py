"""A changed weight as a delta of low rank."""

from __future__ import annotations

import torch

from ..patch import Delta

_MARGIN = 1.05  # for rounding on the way to an edit, like that of a LoRA's product
_CONDITION = 1e-5  # of the base's largest singular value: below it, its outputs carry nothing


def factored(
    wanted: torch.Tensor, base: torch.Tensor, grain: torch.dtype, rank: int | None = None
) -> Delta:
    """The delta of smallest rank that makes ``wanted`` of ``base``, up to rounding.

    By the singular values of the difference, which give the nearest matrix of every rank
    (Eckart & Young 1936). Those that rounding ``wanted`` alone may have brought
    (:func:`rounding_edge`) are left out. The delta is multiplicative, ``L R W``, where that
    takes fewer numbers and what it can't reach is no more than that; additive otherwise.

    Args:
        wanted: ``[d_out, d_in]`` float64.
        base: the same; differs from ``wanted``.
        grain: what ``wanted`` was rounded to.
        rank: this rank instead, where the difference has as much.
    """
    difference = wanted - base
    U, S, V = torch.linalg.svd(difference, full_matrices=False)
    exact = int((1e-12 * S[0] < S).sum())
    edge = float(rounding_edge(wanted, grain))
    if rank is None:
        rank = min(exact, max(1, int(S.gt(edge).sum())))
    else:
        rank = min(exact, rank)
        edge = float(S[rank]) if rank < exact else 1e-9 * float(S[0])
    left, right = U[:, :rank], S[:rank, None] * V[:rank]
    if len(U) < V.shape[1]:
        solved = torch.linalg.lstsq(base.T, right.T, rcond=_CONDITION, driver="gelsd")
        R = solved.solution.T
        if torch.linalg.matrix_norm(right - R @ base, 2) <= edge:
            return Delta.multiplicative(left, R)
    return Delta.additive(left, right)


def rounding_edge(weight: torch.Tensor, grain: torch.dtype) -> torch.Tensor:
    """The largest singular value to be expected of what rounding to ``grain`` did, a scalar.

    An error is taken as even between half a step up and down, so its variance is a twelfth of
    the step's square; the largest norm of a row of deviations plus that of a column bounds the
    spectral norm of such a matrix (Bandeira & van Handel 2016).
    """
    kind = torch.finfo(grain)
    powers = torch.exp2(torch.frexp(weight)[1].double() - 1)  # |w| in [power, 2 power)
    powers = torch.where(weight == 0, 0.0, powers).clamp(min=kind.tiny)
    variances = (kind.eps * powers).square() / 12
    return _MARGIN * (variances.sum(1).max().sqrt() + variances.sum(0).max().sqrt())
