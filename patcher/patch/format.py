"""Patch files: bytes to :class:`Patch` and back (docs/format.md)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from ..errors import FormatVersionError
from . import canonical, container, files
from .bounds import check_norm
from .container import Tensor, damaged
from .delta import SUFFIXES, Delta, Kind, Stored, decode, encode, fits
from .manifest import FORMAT, Manifest, ModuleBase

_SIDES: dict[str, tuple[Kind, Literal[0, 1]]] = {
    "L": ("multiplicative", 0),
    "R": ("multiplicative", 1),
    "A": ("additive", 0),
    "B": ("additive", 1),
}


@dataclass(frozen=True, eq=False, repr=False)
class Patch:
    """An immutable patch: what its file says, the file's bytes, and their SHA-256.

    >>> from patcher import Patch
    >>> patch = Patch.read("forget.st")
    >>> sorted(patch.deltas) == sorted(patch.manifest.base.modules)
    True
    """

    manifest: Manifest
    deltas: Mapping[str, Delta]
    id: str
    data: bytes

    @classmethod
    def build(cls, manifest: Manifest, deltas: Mapping[str, Delta]) -> Patch:
        """Make the file's bytes of a manifest and one delta per module of its base.

        The same arguments give the same bytes, and so the same id.

        Raises:
            InvalidPatchError: manifest and deltas don't agree, or break a bound.
        """
        try:
            text = manifest.canonical()
        except ValueError as error:
            raise damaged(f"The manifest can't be written: {error}.", "Mend that field.") from None
        tensors: list[Tensor] = []
        for name, delta in deltas.items():
            for suffix, part in zip(SUFFIXES[delta.kind], (delta.left, delta.right), strict=True):
                rows, columns = part.shape
                data = encode(part, delta.dtype)
                tensors.append(Tensor(f"{name}.{suffix}", delta.dtype, (rows, columns), data))
        return cls.from_bytes(container.encode(text, tensors))

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Patch:
        """Read a file's bytes; whatever they are, nothing is taken that isn't checked.

        Raises:
            FormatVersionError: another format, or a critical field that this version lacks.
            InvalidPatchError: any other departure from the format.
        """
        data = bytes(data)
        header = container.read_header(data)
        manifest = _manifest(header.manifest)
        tensors = container.read_tensors(header)
        deltas = _deltas(manifest.base.modules, tensors)
        patch_id = hashlib.sha256(data).hexdigest()
        for name, delta in deltas.items():
            check_norm(name, delta, int(patch_id, 16))
        return cls(manifest, MappingProxyType(deltas), patch_id, data)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Patch:
        """Read a patch file.

        Raises:
            InvalidPatchError: no such file, or as :meth:`from_bytes`.
        """
        return cls.from_bytes(files.read(path, container.MAX_FILE_BYTES))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all; an existing one is replaced at once.

        Raises:
            UsageError: the place can't be written.
        """
        files.write(path, self.data)

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, Patch) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<Patch {self.id[:12]} {self.manifest.title!r}: {len(self.deltas)} modules>"


def _manifest(raw: bytes) -> Manifest:
    try:
        fields = canonical.loads(raw)
    except ValueError as error:
        raise damaged(f"The manifest can't be read: {error}.") from None
    if not isinstance(fields, dict):
        raise damaged("The manifest is not a JSON object.")
    _check_version(fields)
    try:
        manifest = Manifest.model_validate(fields)
        same = manifest.canonical() == raw
    except ValidationError as error:
        raise damaged(f"The manifest is malformed: {_first(error)}.") from None
    except ValueError as error:
        raise damaged(f"The manifest is malformed: {error}.") from None
    missing = sorted(set(Manifest.model_fields) - set(fields))
    if missing:
        raise damaged(f"The manifest lacks the field {missing[0]}.")
    if not same:
        raise damaged("The manifest is not in canonical form (RFC 8785).")
    return manifest


def _check_version(fields: dict[str, Any]) -> None:
    cure = "Update patcher, or have the patch made for format 1."
    number = fields.get("format")
    if type(number) is not int:
        raise damaged("The manifest names no format.")
    if number != FORMAT:
        raise FormatVersionError(
            f"The patch is of format {ascii(number)[:40]}; this version reads {FORMAT}.", cure
        )
    critical = fields.get("critical")
    for name in critical if isinstance(critical, list) else []:
        if isinstance(name, str) and name not in Manifest.model_fields:
            raise FormatVersionError(
                f"The patch needs a reader that knows the field {ascii(name)[:80]}.", cure
            )


def _first(error: ValidationError) -> str:
    """The first thing wrong, without the value: that came from outside."""
    details = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(step) for step in details["loc"])
    return f"{ascii(where)[1:-1][:160]}: {details['msg'].removeprefix('Value error, ')}"


def _deltas(modules: Mapping[str, ModuleBase], tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix not in _SIDES or module not in modules:
            raise damaged(f"The tensor {ascii(name)[:80]} belongs to no module of the manifest.")
        parts.setdefault(module, {})[suffix] = tensor
    for module in modules:
        if module not in parts:
            raise damaged(f"The manifest's module {module} has no tensors.")
    return {name: _delta(name, modules[name], parts[name]) for name in sorted(parts)}


def _delta(name: str, base: ModuleBase, parts: dict[str, Tensor]) -> Delta:
    kind = next((kind for kind, names in SUFFIXES.items() if set(parts) == set(names)), None)
    if kind is None:
        raise damaged(f"The module {name} has {sorted(parts)}, neither L with R nor A with B.")
    left, right = (parts[suffix] for suffix in SUFFIXES[kind])
    d_out, d_in = base.shape
    width = d_out if kind == "multiplicative" else d_in
    most = d_out if kind == "multiplicative" else min(d_out, d_in)
    if not fits(kind, left.shape, right.shape) or (left.shape[0], right.shape[1]) != (d_out, width):
        raise damaged(
            f"The tensors of {name}, {left.shape} and {right.shape},"
            f" do not fit its weight of {base.shape}."
        )
    if left.shape[1] > most:
        raise damaged(f"The delta of {name} has rank {left.shape[1]}, beyond its weight's {most}.")
    if left.dtype != right.dtype:
        raise damaged(f"The two tensors of {name} are of different dtypes.")
    values = [decode(part.data, part.dtype, part.shape) for part in (left, right)]
    if not all(np.isfinite(part).all() for part in values):
        raise damaged(f"The delta of {name} has values that are not finite.")
    stored: Stored = left.dtype  # type: ignore[assignment]
    return Delta(kind, values[0], values[1], stored)
