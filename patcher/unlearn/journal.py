"""Intermediate results of a long computation, so that an interrupted one goes on.

A journal is a folder named by a digest of everything that the computation depends on;
an entry is one safetensors file with a checksum. An entry that is damaged counts as
missing. Entries hold numbers only, no text of a fact.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as parse
from safetensors.torch import save as render

from . import checksummed


@dataclass(frozen=True)
class Journal:
    """Entries in ``folder``; without one nothing is kept and nothing is found."""

    folder: Path | None = None

    def load(self, name: str) -> dict[str, torch.Tensor] | None:
        """The tensors of that entry, on the CPU, exactly as saved; None if it isn't there."""
        if self.folder is None:
            return None
        try:
            body = checksummed.read(self.folder / f"{name}.entry")
            return None if body is None else parse(body)
        except Exception:  # whatever is wrong with it, it is computed again
            return None

    def save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write an entry, or replace it, atomically. No space or permission: nothing is kept."""
        if self.folder is None:
            return
        body = render({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
        checksummed.write(self.folder / f"{name}.entry", body)

    def clear(self) -> None:
        """Remove all entries: the computation is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
