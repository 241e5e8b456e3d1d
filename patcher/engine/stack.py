"""The stack of patches in force, as a value: ids and manifests in, answers or errors out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from patcher.errors import StackConflictError, UnknownPatchError
from patcher.patch import Manifest
from patcher.protocol import weight_version
from patcher.text import shown


@dataclass(frozen=True)
class Stack:
    """Patch ids (64 hex digits each) in the order in which they are folded, bottom first."""

    ids: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The engine's weight version: sha256 over the ids, each followed by a newline."""
        return weight_version(self.ids)

    def modules(self, manifests: Mapping[str, Manifest]) -> dict[str, tuple[str, ...]]:
        """For each target module the ids that touch it, bottom first."""
        touched: dict[str, tuple[str, ...]] = {}
        for patch_id in self.ids:
            for name in manifests[patch_id].base.modules:
                touched[name] = (*touched.get(name, ()), patch_id)
        return touched

    def changed_modules(self, target: Stack, manifests: Mapping[str, Manifest]) -> list[str]:
        """The modules that fold to something else under ``target``, sorted by name."""
        before, after = self.modules(manifests), target.modules(manifests)
        return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def admit(ids: Iterable[str], manifests: Mapping[str, Manifest]) -> Stack:
    """The stack of ``ids`` where the patches' manifests admit it.

    Raises
    ------
    UnknownPatchError
        An id that the store doesn't hold.
    StackConflictError
        An id twice, a required patch that isn't below, or a patch that conflicts with another.

    """
    stack = Stack(tuple(ids))
    for position, patch_id in enumerate(stack.ids):
        below = stack.ids[:position]
        if patch_id not in manifests:
            raise UnknownPatchError(
                f"The engine holds no patch {shown(patch_id)}.", "Upload it before naming it."
            )
        if patch_id in below:
            raise StackConflictError(
                f"Patch {patch_id[:16]} stands twice in the stack.", "Name each patch once."
            )
        _admit_one(patch_id, below, stack.ids, manifests[patch_id])
    return stack


def questions(before: Stack, added: Iterable[str], manifests: Mapping[str, Manifest]) -> list[str]:
    """What isn't wrong with putting ``added`` on a stack, and might be a slip."""
    titles = {manifests[i].title: i for i in before.ids}
    return [
        f"{title!r} is in force already as {titles[title][:12]}: is this its next version? "
        "Then `patcher replace` puts it in the other's place."
        for i in added
        if i not in before.ids and (title := manifests[i].title) in titles
    ]


def _admit_one(
    patch_id: str, below: Sequence[str], others: Sequence[str], manifest: Manifest
) -> None:
    missing = [i for i in manifest.requires if i not in below]
    if missing:
        raise StackConflictError(
            f"Patch {patch_id[:16]} requires {', '.join(i[:16] for i in missing)} below it.",
            "Apply what it requires first, or revert it together with what it stands on.",
        )
    clashes = [i for i in manifest.conflicts if i in others]
    if clashes:
        raise StackConflictError(
            f"Patch {patch_id[:16]} conflicts with {', '.join(i[:16] for i in clashes)}.",
            "Revert one of them first.",
        )
