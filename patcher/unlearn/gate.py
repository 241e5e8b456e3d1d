"""ZeroUnlearn's closed form, in the design's consistent form (docs/methods.md, "zero").

For one weight ``W [d_out, d_in]``: keys ``K [d_in, n]`` of the facts, ``U = W K``, a
preserved second moment ``C``, ``A = W C Wᵀ``, and changes of the facts' outputs
``E [d_out, n]``. The ``Δ`` that minimises

    λ_w tr(Δ A Δᵀ) + λ_f |Δ U − E|² + λ |Δ|²

is ``Δ = λ_f E Uᵀ (λ_w A + λ_f U Uᵀ + λ I)⁻¹``, which is ``E R`` with the *gate*
``R = (I/λ_f + Uᵀ X)⁻¹ Xᵀ``, ``X = (λ_w A + λ I)⁻¹ U`` (Woodbury). So ``D = I + E R``
has ``rank(D − I) ≤ n`` and only ``E`` and ``R`` are stored. After Lin et al. 2026,
arXiv 2605.18879, without its projector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Strength:
    """The weights of the objective's three terms."""

    preserve: float = 15000.0  # λ_w
    forget: float = 50.0  # λ_f
    ridge: float = 1.0  # λ


@dataclass(frozen=True)
class Gate:
    """When an edit acts, and what acting costs.

    ``right`` ``[n, d_out]`` float32: ``R``. ``cost`` ``[n, n]`` float64: ``R A Rᵀ`` over
    the mean square of a preserved output, so ``tr(E cost Eᵀ)`` is the mean square
    change of preserved outputs, relative, summed over the output's dimensions.
    """

    right: torch.Tensor
    cost: torch.Tensor


def gate(
    weight: torch.Tensor, keys: torch.Tensor, moment: torch.Tensor, strength: Strength
) -> Gate:
    """The closed form's gate.

    Args:
        weight: ``W [d_out, d_in]`` float32.
        keys: ``Kᵀ [n, d_in]`` float32.
        moment: ``C [d_in, d_in]`` float32.
        strength: the objective's weights.
    """
    W = weight.double()
    return gate_of(W @ moment.to(W) @ W.T, W @ keys.T.to(W), strength)


def gate_of(A: torch.Tensor, U: torch.Tensor, strength: Strength) -> Gate:
    """The same, from ``A = W C Wᵀ [d_out, d_out]`` and ``U = W K [d_out, n]``, float64."""
    eye = torch.eye(len(A)).to(A)
    X = torch.linalg.solve(strength.preserve * A + strength.ridge * eye, U)
    small = torch.eye(U.shape[1]).to(A) / strength.forget + U.T @ X
    R = torch.linalg.solve(small, X.T)
    scale = A.trace() / len(A)
    cost = R @ A @ R.T / scale
    # Keys that coincide make it singular: a ten-thousandth of its mean keeps it invertible.
    cost += torch.eye(len(cost)).to(A) * (1e-4 * cost.trace() / len(cost) + 1e-12)
    return Gate(R.float(), cost)
