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

from patcher.engine import vllm_client
from patcher.engine.ranks import agree, left_over, refusal
from patcher.engine.stack import Stack, admit, questions
from patcher.errors import AlreadyAppliedError, EngineRefusedError, PatcherError
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
    fresh = {patch.id: patch for patch in patches}
    # Before the lock: signatures are many, and nobody can revert while it is held.
    signers, untrusted = await asyncio.to_thread(_signers, service, fresh, bundles)
    async with service.exclusive():
        before = service.store.in_force()
        manifests = {
            **await asyncio.to_thread(service.store.manifests),
            **{i: patch.manifest for i, patch in fresh.items()},
        }
        target = Stack((*before.ids, *(patch.id for patch in patches)))
        refusals = [*_conflicts(before, target, manifests), *untrusted]
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


def _conflicts(
    before: Stack, target: Stack, manifests: Mapping[str, Manifest]
) -> list[dict[str, Any]]:
    """What the manifests refuse."""
    doubled = sorted({i for i in target.ids if i in before.ids and target.ids.count(i) > 1})
    if doubled:
        return [
            _told(AlreadyAppliedError(f"Patch {i[:12]} is in force already.", "Leave it out."))
            for i in doubled
        ]
    try:
        admit(target.ids, manifests)
    except PatcherError as error:
        return [_told(error)]
    return []


def _signers(
    service: PatchService, fresh: Mapping[str, Patch], bundles: Mapping[str, Sequence[bytes]]
) -> tuple[dict[str, list[str]], list[dict[str, Any]]]:
    """Who signed what, and what the trust policy refuses."""
    signers: dict[str, list[str]] = {}
    refusals: list[dict[str, Any]] = []
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
        await _check_settled(service, before)
    except Exception as error:
        return [_told(refusal("The engine failed while it was asked", error))]
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


async def _check_settled(service: PatchService, before: Stack) -> None:
    """A change that failed half-way is mended by the next one; a plan leaves it alone."""
    ranks = await service.ranks.probe()
    await vllm_client.check_awake(service.client)
    if service.transition.stops.standing or not agree(ranks, before):
        raise EngineRefusedError(
            "A change before this one was not ended on every rank.",
            "`patcher verify --heal` mends that, and so does the next change.",
        )
    for change_id in left_over(ranks):
        await service.transition.discard(change_id)  # over, and its end is under way or was lost


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
