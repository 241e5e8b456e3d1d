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


def patches_in(
    sources: Sequence[PatchSource], named: Sequence[str | PathLike[str]] = ()
) -> tuple[list[Patch], list[tuple[str, bytes]]]:
    """The patches that a caller gave, and their signatures, each with the id of its patch.

    Signatures are ``named``, or lie beside a patch's file, or where its URL says.

    Raises :class:`~patcher.errors.InvalidPatchError`, :class:`~patcher.errors.ShippingError`
    for a URL, and :class:`~patcher.errors.UsageError` for a named file that is no signature of
    these patches.
    """
    from patcher.address import is_remote
    from patcher.shipping import pull
    from patcher.signing import bundles_of

    read: list[tuple[Patch, Path | None]] = []
    pulled: list[tuple[str, bytes]] = []
    for source in sources:
        if isinstance(source, str) and is_remote(source):
            patch, beside = pull(source)
            read.append((patch, None))
            pulled += [(patch.id, data) for name, data in beside.items() if name.endswith(".sig")]
        else:
            read.append(_read(source))
    lying = bundles_of(((patch.id, path) for patch, path in read), map(Path, named))
    return [patch for patch, _ in read], list(dict.fromkeys(lying + pulled))


def _read(source: PatchSource) -> tuple[Patch, Path | None]:
    """A patch, and its file where it has one."""
    from patcher.patch import Patch

    if isinstance(source, Patch):
        return source, None
    if isinstance(source, bytes):
        return Patch.from_bytes(source), None
    return Patch.read(source), Path(source)


def guards_in(sources: GuardSource | Sequence[GuardSource]) -> list[dict[str, Any]]:
    """Guards as the protocol has them; raises :class:`~patcher.errors.InputError`."""
    from patcher.guards import read_guards

    return read_guards(sources) if sources else []
