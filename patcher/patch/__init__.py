"""The artifact: patch files, their manifest, and what ties them to a base.

Reads and writes bytes with numpy; torch is imported only by the calls that are
given or asked for tensors.
"""

from __future__ import annotations

from .delta import Delta
from .fingerprint import check_module, commitment, module_base, owner_salt
from .format import Patch
from .manifest import Base, Manifest, Method, ModuleBase, Requests, timestamp, tool

__all__ = [
    "Base",
    "Delta",
    "Manifest",
    "Method",
    "ModuleBase",
    "Patch",
    "Requests",
    "check_module",
    "commitment",
    "module_base",
    "owner_salt",
    "timestamp",
    "tool",
]
