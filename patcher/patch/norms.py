"""How large a low-rank product is, without ever forming it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.floating]


def frobenius(left: Matrix, right: Matrix) -> float:
    """``||left right||_F`` for left ``[m, r]``, right ``[r, n]``: from two r-by-r Gram matrices."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    return float(np.sqrt(max(0.0, np.sum((a.T @ a) * (b @ b.T)))))


def spectral(left: Matrix, right: Matrix) -> float:
    """``||left right||_2``: the same singular values stand in the product of two R factors."""
    return float(singular_values(left, right)[0])


def gain(left: Matrix, right: Matrix) -> float:
    """``||I + left right||_2`` for left ``[d, r]``, right ``[r, d]``.

    Outside the span of ``left`` and ``right``'s transpose (at most 2r dimensions)
    the matrix is the identity, so only its part inside is decomposed.
    """
    a, b = left.astype(np.float64), right.astype(np.float64)
    basis, _ = np.linalg.qr(np.hstack([a, b.T]))
    inside = np.eye(basis.shape[1]) + (basis.T @ a) @ (b @ basis)
    largest = float(np.linalg.svd(inside, compute_uv=False)[0])
    return largest if basis.shape[1] == a.shape[0] else max(1.0, largest)


def singular_values(left: Matrix, right: Matrix) -> npt.NDArray[np.float64]:
    """The ``r`` singular values of ``left right`` that can differ from zero, the largest first."""
    a = np.asarray(np.linalg.qr(left.astype(np.float64), mode="r"))
    b = np.asarray(np.linalg.qr(right.astype(np.float64).T, mode="r"))
    return np.asarray(np.linalg.svd(a @ b.T, compute_uv=False))
