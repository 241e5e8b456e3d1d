"""A delta as a patch file holds it: two matrices of one dtype, as numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import InvalidPatchError
from . import norms

if TYPE_CHECKING:
    import torch

    from ..kernels import LowRank

    Matrix = npt.ArrayLike | torch.Tensor

Kind = Literal["multiplicative", "additive"]
Stored = Literal["F32", "BF16", "F16"]
Floats = npt.NDArray[np.float32]

_EXACT_RANK, _STEPS = 512, 16  # of norms: exact up to that rank, then as many steps

#: The tensors of each kind, left then right.
SUFFIXES: dict[Kind, tuple[str, str]] = {"multiplicative": ("L", "R"), "additive": ("A", "B")}


@dataclass(frozen=True, eq=False)
class Delta:
    """One edit of one weight ``W [d_out, d_in]``; values are those of the file, exactly.

    ``multiplicative``: ``W' = W + left right W``, left ``[d_out, r]``, right ``[r, d_out]``.
    ``additive``: ``W' = W + left right``, left ``[d_out, r]``, right ``[r, d_in]``.
    Both arrays are float32 and read-only; ``dtype`` is what the file stores, and
    every value is one that it can hold.
    """

    kind: Kind
    left: Floats
    right: Floats
    dtype: Stored

    @classmethod
    def multiplicative(cls, left: Matrix, right: Matrix, dtype: Stored = "F32") -> Delta:
        """``I + left right`` from numpy or torch matrices, rounded once to ``dtype``.

        Raises:
            InvalidPatchError: shapes that don't fit, values that are not finite in ``dtype``.
        """
        return _make("multiplicative", left, right, dtype)

    @classmethod
    def additive(cls, left: Matrix, right: Matrix, dtype: Stored = "F32") -> Delta:
        """``W + left right`` from numpy or torch matrices, rounded once to ``dtype``.

        Raises:
            InvalidPatchError: shapes that don't fit, values that are not finite in ``dtype``.
        """
        return _make("additive", left, right, dtype)

    @property
    def rank(self) -> int:
        """The inner dimension ``r``."""
        return int(self.left.shape[1])

    @property
    def norm(self) -> float:
        """The Frobenius norm of ``left right``."""
        return norms.frobenius(self.left, self.right)

    @property
    def spectral_norm(self) -> float:
        """The largest singular value of ``left right``: how far it can move an output.

        Beyond rank 512 an estimate from below, as :attr:`gain`: the exact one takes minutes.
        """
        if self.rank > _EXACT_RANK:
            return norms.at_least(self.left, self.right, seed=0, steps=_STEPS)
        return norms.spectral(self.left, self.right)

    @property
    def gain(self) -> float | None:
        """The largest singular value of ``I + left right``; None for an additive delta."""
        if self.kind == "additive":
            return None
        if self.rank > _EXACT_RANK:
            return norms.at_least(self.left, self.right, seed=0, identity=True, steps=_STEPS)
        return norms.gain(self.left, self.right)

    def to_torch(self) -> LowRank:
        """This delta for :func:`patcher.kernels.fold`: float32 on the CPU, not shared."""
        import torch

        from ..kernels import LowRank

        left, right = (torch.tensor(part) for part in (self.left, self.right))
        return LowRank(self.kind, left, right)


def fits(kind: Kind, left: tuple[int, int], right: tuple[int, int]) -> bool:
    """Whether two shapes can be a delta of that kind, the weight's ``d_in`` left aside."""
    return left[1] == right[0] >= 1 and (kind == "additive" or right[1] == left[0])


def encode(values: Floats, dtype: Stored) -> bytes:
    """The row-major little-endian bytes of values that ``dtype`` holds exactly."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32) >> 16
        return bits.astype("<u2").tobytes()
    return values.astype("<f2" if dtype == "F16" else "<f4").tobytes()


def decode(data: bytes | memoryview, dtype: str, shape: tuple[int, int]) -> Floats:
    """The inverse of :func:`encode`; read-only, a view of ``data`` where it can be."""
    if dtype == "BF16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        values: Floats = bits.view(np.float32)
    else:
        values = np.frombuffer(data, "<f2" if dtype == "F16" else "<f4").astype(
            np.float32, copy=False
        )
    values = values.reshape(shape)
    values.setflags(write=False)
    return values


def _make(kind: Kind, left: Matrix, right: Matrix, dtype: Stored) -> Delta:
    if dtype not in ("F32", "BF16", "F16"):
        raise InvalidPatchError(
            f"A delta can't be stored as {dtype!r}.", "Choose F32, BF16 or F16."
        )
    parts = [_float64(left), _float64(right)]
    if any(part.ndim != 2 for part in parts) or not fits(kind, parts[0].shape, parts[1].shape):
        raise InvalidPatchError(
            f"{parts[0].shape} by {parts[1].shape} is no {kind} delta.",
            "Give left [d_out, r] and right [r, d_out] (multiplicative) or [r, d_in] (additive).",
        )
    rounded = [_round(part, dtype) for part in parts]
    if not all(np.isfinite(part).all() for part in rounded):
        raise InvalidPatchError(
            f"The delta has values that are not finite in {dtype}.",
            "The computation diverged: lower its rate or strength, or store wider.",
        )
    return Delta(kind, rounded[0], rounded[1], dtype)


def _float64(matrix: Any) -> npt.NDArray[np.float64]:
    if hasattr(matrix, "detach"):  # a torch tensor, without importing torch
        matrix = matrix.detach().to("cpu").double().numpy()
    return np.array(matrix, dtype=np.float64, order="C")


def _round(values: npt.NDArray[np.float64], dtype: Stored) -> Floats:
    """``values`` rounded once, to nearest, ties to even, to what ``dtype`` can hold."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype == "F16":
            result = values.astype(np.float16).astype(np.float32)
        elif dtype == "F32":
            result = values.astype(np.float32)
        else:
            result = _bfloat16(values)
    result.setflags(write=False)
    return result


def _bfloat16(values: npt.NDArray[np.float64]) -> Floats:
    """By way of a float32 rounded to odd (Boldo & Melquiond 2008), so that it rounds once."""
    nearest = values.astype(np.float32)
    bits = nearest.view(np.uint32)
    bits -= np.abs(nearest) > np.abs(values)
    bits |= nearest != values
    lifted = bits + (0x7FFF + ((bits >> 16) & 1))
    result: Floats = (lifted & np.uint32(0xFFFF0000)).view(np.float32)
    result[~np.isfinite(values)] = np.nan
    return result
