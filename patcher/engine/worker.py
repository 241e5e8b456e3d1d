"""What each rank does: hold patches, stage folded weights, commit or roll back, verify.

The functions named ``patcher_*`` become methods of vLLM's workers and are called through
``collective_rpc``. They take plain values and bytes, never raise, and answer with a dict
that echoes the caller's nonce: vLLM does not drain replies after an exception, so one that
escaped would leave every later reply off by one.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch

from patcher import __version__
from patcher.engine.names import refuse_one_layer_twice
from patcher.engine.sites import Site, Staged
from patcher.engine.vllm_overlay import is_overlay
from patcher.engine.vllm_worker import find_site, install_on_workers
from patcher.errors import BaseMismatchError, EngineRefusedError, PatcherError
from patcher.kernels import digest
from patcher.patch import ModuleBase, Patch
from patcher.patch.fingerprint import check_module

P = ParamSpec("P")
Reply = dict[str, Any]


class _InForce(NamedTuple):
    """What a rank serves and what it knows of that."""

    stack: tuple[str, ...]
    live: dict[str, str]
    sums: dict[str, int]
    bases: dict[str, torch.Tensor]


@dataclass
class _Change:
    """A change under way on this rank."""

    id: str
    stack: tuple[str, ...]
    staged: dict[str, Staged] = field(default_factory=dict)
    bases: dict[str, torch.Tensor] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=dict)  # checksums of what was read back
    touched: list[Staged] = field(default_factory=list)  # live weights that it changed
    before: _InForce | None = None  # once committed


class RankState:
    """One rank's patches, pristine bases and stack in force."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.patches: dict[str, Patch] = {}
        self.bases: dict[str, torch.Tensor] = {}  # host copies, of patched modules only
        self.stack: tuple[str, ...] = ()
        self.live: dict[str, str] = {}  # digests of what was put in force, of patched modules
        self.sums: dict[str, int] = {}  # checksums of the same
        self.overlaid: set[str] = set()  # modules whose patches act on their output
        self.change: _Change | None = None
        self.ended = ""  # the last change that was

    def begin(self, change_id: str, stack: tuple[str, ...]) -> None:
        """Start a change to ``stack``."""
        if self.change is not None:
            if self.change.touched:
                raise EngineRefusedError("A change that was not ended is in the way.", "Try again.")
            self.change = None  # its caller died while staging
        missing = [i for i in stack if i not in self.patches]
        if missing:
            raise EngineRefusedError(f"This rank lacks patch {missing[0][:16]}.", "Try again.")
        refuse_one_layer_twice(self.model, {n for i in stack for n in self.patches[i].deltas})
        self.change = _Change(change_id, stack)

    def current(self, change_id: str) -> _Change:
        """The change under way, which must be ``change_id``."""
        if self.change is None or self.change.id != change_id:
            raise EngineRefusedError("Another change took this one's place.", "Try again.")
        return self.change

    def stage(self, change_id: str, name: str) -> bool:
        """Fold module ``name`` beside the live weight; False where this rank doesn't hold it."""
        change = self.current(change_id)
        site = find_site(self.model, name)
        if site is None:
            return False
        base = self.bases[name] if name in self.bases else site.base()
        for expected in self._bases_named(name, (*change.stack, *self.stack)):
            _check_base(name, expected, base, site)
        weight = self.made(name, base, change.stack, site)
        if not bool(torch.isfinite(weight).all()):
            raise EngineRefusedError(
                f"The folded weight of {name} is not finite.",
                "The patches overflow the served dtype together; leave one out.",
            )
        change.sums.pop(name, None)
        change.staged[name] = site.stage(weight)
        change.digests[name] = digest(weight)
        change.bases[name] = base
        if is_overlay(site):
            self.overlaid.add(name)
        return True

    def check_staged(self, change_id: str, name: str) -> None:
        """Read back what was staged for module ``name``, where this rank holds it."""
        change = self.current(change_id)
        staged = change.staged.get(name)
        if staged is None:
            return
        if digest(staged.read()) != change.digests[name]:
            raise EngineRefusedError(f"What was staged for {name} reads back differently.")
        change.sums[name] = staged.checksum()

    def _bases_named(self, name: str, stack: tuple[str, ...]) -> list[ModuleBase]:
        """The bases of module ``name`` that patches were computed on, each once.

        Also of patches that go: with none left, nothing else would tell the base from a fold.
        """
        held = [self.patches[i] for i in stack if i in self.patches]
        named = [p.manifest.base.modules[name] for p in held if name in p.deltas]
        return list({(one.shape, one.dtype, one.digest, one.blocks): one for one in named}.values())

    def made(
        self, name: str, base: torch.Tensor, stack: tuple[str, ...], site: Site
    ) -> torch.Tensor:
        """What ``stack`` makes of this rank's columns of module ``name``."""
        columns = site.columns
        deltas = [
            self.patches[i].deltas[name].to_torch().columns(columns.start, columns.stop)
            for i in stack
            if name in self.patches[i].deltas
        ]
        return site.made(base, deltas)

    def commit(self, change_id: str) -> None:
        """Put every staged weight in force."""
        change = self.current(change_id)
        if change.before is not None:
            return
        if unread := sorted(change.staged.keys() - change.sums.keys()):
            raise EngineRefusedError(f"What was staged for {unread[0]} was not read back.")
        for staged in change.staged.values():
            change.touched.append(staged)  # before: it may fail half-way
            staged.commit()
        change.before = _InForce(self.stack, self.live, self.sums, self.bases)
        self.stack, self.live = change.stack, {**self.live, **change.digests}
        self.sums = {**self.sums, **change.sums}
        self.bases = {**self.bases, **change.bases}

    def roll_back(self, change_id: str) -> None:
        """Undo what the change did on this rank, whatever that was."""
        change = self.change
        if change is None or change.id != change_id:
            return
        for staged in reversed(change.touched):
            staged.undo()
        if change.before is not None:
            self.stack, self.live, self.sums, self.bases = change.before
        self.change = None

    def finish(self, change_id: str) -> None:
        """Forget the change, and keep only what the stack in force needs.

        While another change is held nothing is let go: its end, or its undoing, needs all of it.
        Nor is anything for a change that was ended before: what came since is the next one's.
        """
        change = self.change
        if change is None and change_id == self.ended:
            return
        if change is not None and change.id != change_id:
            return
        self.ended, self.change = change_id, None
        self.patches = {i: p for i, p in self.patches.items() if i in self.stack}
        patched = {n for p in self.patches.values() for n in p.deltas}
        self.bases = {n: base for n, base in self.bases.items() if n in patched}
        self.live = {n: found for n, found in self.live.items() if n in patched}
        self.sums = {n: found for n, found in self.sums.items() if n in patched}

    def check(self, name: str) -> Reply:
        """The live weight's digest: is it what was put there, or else the base again?

        Where its checksum is the one that was put there, so is its digest.
        """
        site = find_site(self.model, name)
        if site is None:
            return {"digest": None, "ok_live": True, "pristine": False}
        if name in self.sums and site.checksum() == self.sums[name]:
            return {"digest": self.live[name], "ok_live": True, "pristine": False}
        found = digest(site.read())
        ok = self.live.get(name, found) == found
        pristine = not ok and name in self.bases and digest(self.bases[name]) == found
        return {"digest": found, "ok_live": ok, "pristine": pristine}

    def verify(self, name: str, expected: ModuleBase) -> Reply | None:
        """Read the live weight and compare it with the fold of the stack in force."""
        site = find_site(self.model, name)
        if site is None:
            return None
        live = site.read()
        base = self.bases[name] if name in self.bases else site.base()
        try:
            _check_base(name, expected, base, site)
        except PatcherError:
            return {"ok": False, "digest": digest(live)}
        must = self.made(name, base, self.stack, site)
        return {"ok": digest(must) == digest(live), "digest": digest(live)}


def _check_base(name: str, expected: ModuleBase, weight: torch.Tensor, site: Site) -> None:
    columns = site.columns
    try:
        check_module(name, expected, weight, columns.start, columns.stop)
    except BaseMismatchError as error:
        if not is_overlay(site):
            raise
        raise BaseMismatchError(
            error.message, "It is quantised: compute the patch on this very checkpoint."
        ) from None


# -- the calls -----------------------------------------------------------------------------------


def _answers(
    call: Callable[Concatenate[Any, RankState, P], Mapping[str, Any]],
) -> Callable[..., Reply]:
    """Turn ``call(worker, state, …)`` into a worker method that never raises.

    Its reply says how many ``seconds`` it took: a step of the model waits as long.
    """

    @functools.wraps(call)
    def method(worker: Any, nonce: str, *args: P.args, **kwargs: P.kwargs) -> Reply:
        began = time.monotonic()
        reply: Reply = {"nonce": nonce, "rank": int(getattr(worker, "rank", 0)), "pid": os.getpid()}
        try:
            state = getattr(worker, "_patcher_state", None)
            if state is None:
                state = worker._patcher_state = RankState(worker.get_model())
            reply |= {"ok": True, **call(worker, state, *args, **kwargs)}
        except Exception as error:
            reply |= {"ok": False, **_failure(error)}
        return {**reply, "seconds": time.monotonic() - began}

    return method


def _failure(error: Exception) -> Reply:
    """What a reply tells of an error."""
    if isinstance(error, PatcherError):
        return {"error": error.code, "detail": error.message, "cure": error.cure}
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        detail = f"This rank ran out of memory ({str(error).partition('. ')[0] or 'host'})."
        cure = "Free memory on its machine: the fold needs one module, the stack its bases."
        return {"error": EngineRefusedError.code, "detail": detail, "cure": cure}
    detail = f"{type(error).__name__}: {error}"
    return {"error": PatcherError.code, "detail": detail, "cure": ""}


@_answers
def patcher_probe(worker: Any, state: RankState) -> Reply:
    """Which patcher this rank runs, and what it holds."""
    change = state.change.id if state.change else None
    return {
        "version": __version__,
        "stack": list(state.stack),
        "held": sorted(state.patches),
        "change": change,
        "overlaid": sorted(state.overlaid & state.live.keys()),
    }


@_answers
def patcher_receive(worker: Any, state: RankState, data: bytes) -> Reply:
    """Take a patch file's bytes, verify them, and hold the patch."""
    patch = Patch.from_bytes(data)
    state.patches[patch.id] = patch
    return {"patch": patch.id}


@_answers
def patcher_begin(worker: Any, state: RankState, change_id: str, stack: list[str]) -> Reply:
    """Start a change."""
    state.begin(change_id, tuple(stack))
    return {}


@_answers
def patcher_stage(worker: Any, state: RankState, change_id: str, name: str) -> Reply:
    """Stage one module, so that no decode step waits for more than one."""
    held = state.stage(change_id, name)
    return {"holds": held, "digest": state.current(change_id).digests.get(name)}


@_answers
def patcher_check_staged(worker: Any, state: RankState, change_id: str, name: str) -> Reply:
    """Read back what was staged for one module."""
    state.check_staged(change_id, name)
    return {}


@_answers
def patcher_commit(worker: Any, state: RankState, change_id: str) -> Reply:
    """Exchange the staged weights with the live ones."""
    state.commit(change_id)
    return {}


@_answers
def patcher_roll_back(worker: Any, state: RankState, change_id: str) -> Reply:
    """Go back to the stack before, or drop what was staged."""
    state.roll_back(change_id)
    return {"stack": list(state.stack)}


@_answers
def patcher_finish(worker: Any, state: RankState, change_id: str) -> Reply:
    """Let go of the stack before."""
    state.finish(change_id)
    return {"stack": list(state.stack)}


@_answers
def patcher_check(worker: Any, state: RankState, name: str) -> Reply:
    """Read one live weight back."""
    return state.check(name)


@_answers
def patcher_verify(worker: Any, state: RankState, name: str, module: dict[str, Any]) -> Reply:
    """Compare a live weight with what base and stack must give; ``module``: its base."""
    return {"verdict": state.verify(name, ModuleBase.model_validate(module))}


METHODS: tuple[Callable[..., Reply], ...] = (
    patcher_probe,
    patcher_receive,
    patcher_begin,
    patcher_stage,
    patcher_check_staged,
    patcher_commit,
    patcher_roll_back,
    patcher_finish,
    patcher_check,
    patcher_verify,
)


def install() -> None:
    """Make the calls methods of vLLM's workers."""
    install_on_workers(METHODS)
