"""The arithmetic of patches on tensors: torch alone, on any device.

``fold`` gives the weights that a stack of deltas makes of a base, ``compose``
turns several deltas into one, ``overlay`` puts one on a module's output, ``digest`` names a
tensor's bits and ``checksum`` tells quickly whether they changed. Nothing here reads a file,
knows a model or holds state.
"""

from __future__ import annotations

from .compose import compose
from .digest import checksum, column_blocks, column_digests, digest
from .fold import fold
from .low_rank import LowRank
from .overlay import factors, overlay

__all__ = [
    "LowRank",
    "checksum",
    "column_blocks",
    "column_digests",
    "compose",
    "digest",
    "factors",
    "fold",
    "overlay",
]
