"""The fold in float64, with a bound on its error beside each value.

A dot product of n terms, summed in any order, is off by at most ``n u`` times the
sum of its terms' magnitudes, u = 2^-53 (Higham, "Accuracy and Stability of Numerical
Algorithms", section 3.1). That sum is at most a product of two norms (Cauchy and
Schwarz), which costs no further matrix product, and makes every bound a sum of a few
outer products. All are twice as large as that asks: room for their own rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .fold import LowRank

_UNIT = 2.0**-52
_EXPONENT = 0x7FF0_0000_0000_0000  # of a float64


class _Off(NamedTuple):
    """``rows @ columns``, how far the values of a matrix may be off; none is negative."""

    rows: torch.Tensor  # [m, k], k small
    columns: torch.Tensor  # [k, t]

    def norms(self) -> torch.Tensor:
        """At least the norm of each column, ``[t]``."""
        return torch.mv(self.columns.t(), self.rows.norm(dim=0))


def bounds(
    base: torch.Tensor, deltas: Sequence[LowRank], *, accurate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float64 matrices with the exact fold between them, element by element.

    Where a value is not finite, nor is one of the two or both.

    Args:
        base: ``[d_out, t]``.
        deltas: float64, for those columns.
        accurate: three times the matrix products, a thousandth of the distance.
    """
    times = _accurate if accurate else _plain
    x = base.to(torch.float64, memory_format=torch.contiguous_format)
    off = _nothing(x)
    for delta in deltas:
        if delta.kind == "multiplicative":
            inner, inner_off = times(delta.right, x, off)
        else:
            inner, inner_off = delta.right, _nothing(delta.right)
        change, change_off = times(delta.left, inner, inner_off)
        x.add_(change)
        off = _join(off, change_off, _rounding(x))
    return torch.addmm(x, *off, alpha=-1), torch.addmm(x, *off)


def _plain(a: torch.Tensor, b: torch.Tensor, b_off: _Off) -> tuple[torch.Tensor, _Off]:
    """``a @ b`` for ``a [m, n]`` and ``b [n, t]``, and how far it may be off."""
    columns = _terms(a.shape[1]) * b.norm(dim=0) + b_off.norms()
    return a @ b, _Off(a.norm(dim=1)[:, None], columns[None])


def _accurate(a: torch.Tensor, b: torch.Tensor, b_off: _Off) -> tuple[torch.Tensor, _Off]:
    """The same; the leading part of the product is exact, so only the rest rounds.

    After Ozaki, Ogita, Oishi & Rump, "Error-free transformations of matrix
    multiplication" (2012).
    """
    n = a.shape[1]
    a_high, a_low = _split(a, 1, n)
    b_high, b_low = _split(b, 0, n)
    c = a_high @ b_high + (a_high @ b_low + a_low @ b)
    high = _Off(a.norm(dim=1)[:, None], (_terms(n) * b_low.norm(dim=0) + b_off.norms())[None])
    low = _Off(a_low.norm(dim=1)[:, None], _terms(n) * b.norm(dim=0)[None])
    return c, _join(high, low, _rounding(c))


def _split(a: torch.Tensor, dim: int, terms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``a`` as high + low, exactly; the products of two high parts sum up without rounding.

    The high part keeps so many bits below the largest value along ``dim`` that a
    sum of ``terms`` products stays below 2^53 of its units.
    """
    bits = (53 - terms.bit_length()) // 2
    largest = a.abs().amax(dim, keepdim=True)
    power = largest.view(torch.int64).bitwise_and(_EXPONENT).view(torch.float64)
    # Adding 1.5 * 2^k and taking it away again rounds to multiples of 2^(k - 52).
    shift = power * (1.5 * 2.0 ** (53 - bits))
    high = (a + shift) - shift
    return high, a - high


def _rounding(x: torch.Tensor) -> _Off:
    """What one rounding of each value may cost."""
    columns = _UNIT * x.abs().amax(dim=0, keepdim=True)
    return _Off(torch.ones_like(x[:, :1]), columns)


def _nothing(x: torch.Tensor) -> _Off:
    return _Off(x.new_zeros(x.shape[0], 1), x.new_zeros(1, x.shape[1]))


def _join(*parts: _Off) -> _Off:
    rows, columns = zip(*parts, strict=True)
    return _Off(torch.cat(rows, dim=1), torch.cat(columns, dim=0))


def _terms(n: int) -> float:
    return (n + 8) * _UNIT
