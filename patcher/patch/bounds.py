"""How far a delta may move outputs (docs/format.md, "Bounds"): what a stranger's file can't exceed.

Real edits stay far below: `zero` reaches a gain of 1.3, MEMIT a norm of 8 beside weights of 25.
The bounds keep out what is no edit of any model, and what would overflow in a fold.
"""

from __future__ import annotations

from . import norms
from .container import damaged
from .delta import Delta

MAX_GAIN = 2.0**10  # largest singular value of I + L R
MAX_SPECTRAL_NORM = 2.0**16  # of A B
EXACT_RANK = 32  # up to it the check is exact, beyond it an estimate: time linear in the bytes


def check_norm(name: str, delta: Delta, seed: int) -> None:
    """Raise where ``delta`` of the module ``name`` is larger than any edit is.

    ``seed`` draws the estimate's start. The file's id gives it, so that one file is always
    answered in one way, and nobody can choose a delta that hides from the start.

    Raises:
        InvalidPatchError: the norm is beyond its bound.
    """
    multiplicative = delta.kind == "multiplicative"
    most = MAX_GAIN if multiplicative else MAX_SPECTRAL_NORM
    if multiplicative + norms.at_most(delta.left, delta.right) <= most:
        return  # cheap, and true of nearly every patch
    if delta.rank > EXACT_RANK:
        found = norms.at_least(delta.left, delta.right, seed=seed, identity=multiplicative)
    elif multiplicative:
        found = norms.gain(delta.left, delta.right)
    else:
        found = norms.spectral(delta.left, delta.right)
    if found > most:
        what = "a gain" if multiplicative else "a spectral norm"
        raise damaged(
            f"The delta of {name} has {what} of {found:.4g}, where {most:.0f} is the most:"
            " it would blow the weight up.",
            "Have the patch computed again with a lower strength; nothing was changed.",
        )
