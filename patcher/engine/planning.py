"""What a change would do, found out by preparing it beside the live weights and letting go of it.

Nothing is stored, recorded or put in force; every rank checks bases and folds as for a change.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patcher.engine.ranks import refusal
from patcher.engine.stack import Stack, admit, questions
from patcher.errors import AlreadyAppliedError, PatcherError
from patcher.patch import Manifest, Patch

if TYPE_CHECKING:
    from patcher.engine.service import PatchService

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


async def plan(
    service: PatchService, patches: Sequence[Patch], bundles: Mapping[str, Sequence[bytes]]
) -> dict[str, Any]:
    """What putting ``patches`` on the top of the stack would do, or why it would be refused.

    ``bundles``: signatures by patch id, beside those that the engine holds. The answer is
    ``docs/protocol.md``'s, "Plans". Modules are staged between two steps, as for a change.
    """
    began = time.monotonic()
    async with service.exclusive():
        before = service.store.in_force()
        fresh = {patch.id: patch for patch in patches}
        manifests = {
            **await asyncio.to_thread(service.store.manifests),
            **{i: patch.manifest for i, patch in fresh.items()},
        }
        target = Stack((*before.ids, *(patch.id for patch in patches)))
        signers, refusals = await asyncio.to_thread(_checked, service, before, target, fresh,
                                                    manifests, bundles)  # fmt: skip
        if not refusals:
            refusals = await _staged(service, before, target, fresh, manifests)
        known = set(before.modules(manifests))
    changed = before.changed_modules(target, manifests)
    modules = {name: _module(name, target, manifests) for name in changed}
    return {
        "ok": not refusals,
        "stack": list(target.ids),
        "weight_version": target.version,
        "refusals": refusals,
        "questions": questions(before, fresh, manifests),
        "signers": signers,
        "modules": modules,
        "staged_bytes": sum(one["bytes"] for one in modules.values()),
        "base_bytes": sum(one["bytes"] for name, one in modules.items() if name not in known),
        "pause_ms": statistics.median(service.pauses) if service.pauses else None,
        "seconds": round(time.monotonic() - began, 4),
    }


def _checked(
    service: PatchService,
    before: Stack,
    target: Stack,
    fresh: Mapping[str, Patch],
    manifests: Mapping[str, Manifest],
    bundles: Mapping[str, Sequence[bytes]],
) -> tuple[dict[str, list[str]], list[dict[str, Any]]]:
    """Who signed what, and everything that the manifests and the trust policy refuse."""
    refusals: list[dict[str, Any]] = []
    for patch_id in sorted(fresh.keys() & set(before.ids)):
        refusals.append(_told(AlreadyAppliedError(f"Patch {patch_id[:12]} is in force already.")))
    if not refusals:
        try:
            admit(target.ids, manifests)
        except PatcherError as error:
            refusals.append(_told(error))
    signers: dict[str, list[str]] = {}
    for patch in fresh.values():
        try:
            signers |= service.trust.check_one(patch, bundles.get(patch.id, ()))
        except PatcherError as error:
            refusals.append(_told(error))
    return signers, refusals


async def _staged(
    service: PatchService,
    before: Stack,
    target: Stack,
    fresh: Mapping[str, Patch],
    manifests: Mapping[str, Manifest],
) -> list[dict[str, Any]]:
    """What the ranks refuse: every module is tried, so that all of them are told."""
    change_id = secrets.token_hex(8)
    refusals: list[dict[str, Any]] = []
    try:
        for patch in fresh.values():
            await service.ranks.call("patcher_receive", patch.data)
        await service.ranks.call("patcher_begin", change_id, list(target.ids))
        for name in before.changed_modules(target, manifests):
            refusals += await _tried(service, change_id, name)
    except Exception as error:
        refusals.append(_told(refusal("The engine failed while it prepared the change", error)))
    finally:
        await service.transition.discard(change_id)
    return refusals


async def _tried(service: PatchService, change_id: str, name: str) -> list[dict[str, Any]]:
    try:
        await service.transition.stage_module(change_id, name)
    except PatcherError as error:
        return [{**_told(error), "module": name}]
    return []


def _module(name: str, target: Stack, manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    ids = target.modules(manifests)[name]
    base = manifests[ids[0]].base.modules[name]
    return {"patches": list(ids), "bytes": base.shape[0] * base.shape[1] * _BYTES[base.dtype]}


def _told(error: BaseException) -> dict[str, Any]:
    assert isinstance(error, PatcherError)
    return {
        **error.details,
        "code": error.code,
        "message": error.message,
        "cure": error.cure,
        "exit_code": error.exit_code,
    }
