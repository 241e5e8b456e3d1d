"""Patches on their way: to and from OCI registries, the Hugging Face Hub, and any fsspec URL.

Everything that arrives is bytes from a stranger: it is bounded, its id may be pinned, and it is
read as any patch file is. Credentials are those libraries' own (docs/shipping.md).
"""

from __future__ import annotations

from .moving import pull, push
from .places import Parcel

__all__ = ["Parcel", "pull", "push"]
