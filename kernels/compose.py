"""Several deltas as one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from .fold import LowRank


@torch.no_grad()
def compose(deltas: Sequence[LowRank]) -> LowRank:
    """One delta that does what ``deltas`` do in order, ``deltas[0]`` first.

    ``(I + L2 R2)(I + L1 R1) = I + [L1 L2] [R1; R2 + (R2 L1) R1]``; additive ones
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
    wide = [
        delta._replace(
            left=delta.left.detach().to(device, torch.float64),
            right=delta.right.detach().to(device, torch.float64),
        )
        for delta in deltas
    ]
    return reduce(_pair, wide)


def _pair(first: LowRank, second: LowRank) -> LowRank:
    right = second.right
    if first.kind == "multiplicative":
        right = right + (right @ first.left) @ first.right
    return LowRank(
        first.kind,
        torch.cat([first.left, second.left], dim=1),
        torch.cat([first.right, right], dim=0),
    )
