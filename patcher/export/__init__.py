"""Ways out and in: patches as adapters and as checkpoints, and both of them as patches.

``to_peft`` and ``to_checkpoint`` write what other programs load; ``from_peft`` and
``from_checkpoints`` make a patch of what other programs wrote, ``rebase`` one for the same
weights elsewhere (docs/ways-out.md). Weights are
read from the checkpoint's files one at a time; no model is built and nothing is unpickled.
"""

from __future__ import annotations

from .adapters import Adapter, to_peft
from .differences import from_checkpoints
from .importing import Imported
from .loras import from_peft
from .merging import Merged, to_checkpoint
from .rebasing import Rebased, rebase

__all__ = [
    "Adapter",
    "Imported",
    "Merged",
    "Rebased",
    "from_checkpoints",
    "from_peft",
    "rebase",
    "to_checkpoint",
    "to_peft",
]
