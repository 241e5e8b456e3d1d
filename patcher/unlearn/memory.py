"""What a computation will hold in memory, predicted before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import NotEnoughMemoryError
from .forward import TOKENS
from .models import outline
from .slopes import TOKENS as DIFFERENTIATED

MOMENTS = 6  # second moments of a layer that are held at once, at most
BASE = 600 * 2**20  # bytes of Python, torch and transformers themselves
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Need:
    """Bytes by what they are for; ``weights``, ``batch`` and ``summed`` lie on the device."""

    weights: int  # held in float32
    loading: int  # the checkpoint beside them, while they are converted
    statistics: int  # second moments and the solve
    batch: int  # activations and logits of one batch
    summed: int  # second moments while they are summed; one machine's are among ``statistics``

    @property
    def total(self) -> int:
        """All of it on one machine: what is loaded is gone when the rest is needed."""
        return self.weights + max(self.loading, self.statistics + self.batch) + BASE


def needed(name: str | Path, layers: int | None = None) -> Need:
    """What computing on that model will hold, from its configuration alone.

    Args:
        name: a directory or a hub id.
        layers: how many are edited; None: three.

    Raises:
        ModelError: the model can't be used.
    """
    model = outline(name)
    config: Any = model.network.config
    count = sum(p.numel() for p in model.network.parameters())
    d_out, d_in = model.weight(model.module_name(0)).shape
    edited = min(layers or 3, model.layers)
    # An activation of every layer is kept for the backward pass: about ten of the width.
    kept = DIFFERENTIATED * model.layers * (10 * d_out + 4 * d_in)
    scores = TOKENS * int(config.vocab_size)
    return Need(
        4 * count,
        2 * count,
        4 * MOMENTS * edited * d_in**2 + 8 * 6 * d_out * max(d_out, d_in),
        4 * (kept + 2 * scores),
        4 * edited * d_in**2,
    )


def enough(need: Need, device: torch.device) -> None:
    """See that there is as much memory as is needed, as far as that can be told.

    Raises:
        NotEnoughMemoryError: with the figures.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        _refuse(need.weights + need.batch + need.summed, free, f"on {device}")
        _refuse(need.loading + need.statistics + BASE, available(), "of this machine")
    else:
        _refuse(need.total, available(), "of this machine")


def _refuse(wanted: int, free: int | None, where: str) -> None:
    if free is not None and wanted > free:
        raise NotEnoughMemoryError(
            f"Computing needs about {wanted / 2**30:.1f} GiB of memory {where}; "
            f"{free / 2**30:.1f} GiB are free.",
            "Edit fewer --layers, free some, or go on all the same with --ignore-memory.",
        )


def available() -> int | None:
    """Bytes that this process may still take: of the machine and its control group.

    None where the system doesn't tell.
    """
    found = [_meminfo().get("MemAvailable"), _left_in_group()]
    told = [value for value in found if value is not None]
    return min(told) if told else None


def _meminfo() -> Mapping[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if " kB" in line}
    except (OSError, ValueError, IndexError):  # no Linux
        return {}


def _left_in_group() -> int | None:
    try:
        limit = int((_CGROUP / "memory.max").read_text("ascii"))  # "max" where there is none
        used = int((_CGROUP / "memory.current").read_text("ascii"))
        stat = dict(
            line.split(maxsplit=1)
            for line in (_CGROUP / "memory.stat").read_text("ascii").splitlines()
        )
        return limit - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return None
