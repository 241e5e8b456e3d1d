"""How large a low-rank product is, without ever forming it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.floating]
BLOCK = 16  # directions that an estimate follows at once


def frobenius(left: Matrix, right: Matrix) -> float:
    """``||left right||_F`` for left ``[m, r]``, right ``[r, n]``: from two r-by-r Gram matrices."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    return float(np.sqrt(max(0.0, np.sum((a.T @ a) * (b @ b.T)))))


def spectral(left: Matrix, right: Matrix) -> float:
    """``||left right||_2``: the same singular values stand in the product of two R factors."""
    return float(singular_values(left, right)[0])


def at_most(left: Matrix, right: Matrix) -> float:
    """``||left||_F ||right||_F``, never below ``||left right||_2``; one pass over the values."""
    squares = (np.einsum("ij,ij->", part, part, dtype=np.float64) for part in (left, right))
    return math.sqrt(next(squares)) * math.sqrt(next(squares))


def at_least(
    left: Matrix, right: Matrix, *, seed: int, identity: bool = False, steps: int = 4
) -> float:
    """``||left right||_2``, or with ``identity`` that of ``I + left right``, from below.

    Time and memory are linear in the values. Never above the norm; after four steps below it by
    a seventh in the worst spectrum found, by nothing that shows where one direction stands out.
    Block power iteration (Halko, Martinsson & Tropp 2011, SIAM Review 53, algorithm 4.4).
    """
    a, b = left.astype(np.float64), right.astype(np.float64)
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((b.shape[1], min(BLOCK, b.shape[1])))
    for _ in range(steps):
        x, _ = np.linalg.qr(x)
        y = a @ (b @ x) + x if identity else a @ (b @ x)
        y, _ = np.linalg.qr(y)
        x = b.T @ (a.T @ y) + y if identity else b.T @ (a.T @ y)
    x, _ = np.linalg.qr(x)
    y = a @ (b @ x) + x if identity else a @ (b @ x)
    return float(np.linalg.svd(y, compute_uv=False)[0])


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
