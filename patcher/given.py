"""What callers give to :class:`patcher.Engine`: patches, ids, guards, signatures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from patcher.errors import AmbiguousIdError, UnknownPatchError, UsageError

if TYPE_CHECKING:
    from patcher.guards import GuardSource
    from patcher.patch import Patch

PatchSource: TypeAlias = "Patch | bytes | str | PathLike[str]"


def resolve(prefixes: Iterable[str], stack: Sequence[str]) -> list[str]:
    """The whole ids of a stack that shortened ones mean.

    Raises :class:`~patcher.errors.UsageError` for an empty one,
    :class:`~patcher.errors.UnknownPatchError` and
    :class:`~patcher.errors.AmbiguousIdError`.

    >>> resolve(["beef"], ["beef" + 60 * "0", "cafe" + 60 * "0"]) == ["beef" + 60 * "0"]
    True
    """
    return [_resolve(prefix.strip().lower(), stack) for prefix in prefixes]


def _resolve(prefix: str, stack: Sequence[str]) -> str:
    if not prefix:
        raise UsageError("An id is empty.", "An id is 64 hexadecimal digits, or its first few.")
    found = [one for one in stack if one.startswith(prefix)]
    if not found:
        raise UnknownPatchError(
            f"No patch {prefix[:64]} is in force.", "`patcher status` lists those that are."
        )
    if len(found) > 1:
        names = ", ".join(one[: len(prefix) + 8] for one in found)
        raise AmbiguousIdError(f"{prefix} could be any of {names}.", "Write more of the id.")
    return found[0]


def whole_id(patch_id: str) -> str:
    """``patch_id``, where it is one; raises :class:`~patcher.errors.UsageError`."""
    if len(patch_id) != 64 or any(c not in "0123456789abcdef" for c in patch_id):
        raise UsageError(f"{patch_id!r} is not a whole patch id.", "It has 64 hexadecimal digits.")
    return patch_id


def read_patch(source: PatchSource) -> Patch:
    """The patch that a caller gave; raises :class:`~patcher.errors.InvalidPatchError`."""
    from patcher.patch import Patch

    if isinstance(source, Patch):
        return source
    return Patch.from_bytes(source) if isinstance(source, bytes) else Patch.read(source)


def bundles_with(
    sources: Sequence[PatchSource],
    read: Sequence[Patch],
    named: Sequence[str | PathLike[str]] = (),
) -> list[tuple[str, bytes]]:
    """The signatures of patches, ``read`` from ``sources``: beside their files, and ``named``."""
    from patcher.patch import Patch
    from patcher.signing import bundles_of

    files = [None if isinstance(one, bytes | Patch) else Path(one) for one in sources]
    return bundles_of(zip((one.id for one in read), files, strict=True), map(Path, named))


def guards_in(sources: GuardSource | Sequence[GuardSource]) -> list[dict[str, Any]]:
    """Guards as the protocol has them; raises :class:`~patcher.errors.InputError`."""
    from patcher.guards import read_guards

    return read_guards(sources) if sources else []
