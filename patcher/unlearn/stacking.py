"""On top of a stack: which patches lie beneath a new one, and what they keep forgotten.

What is computed inside :func:`stacked` sees the stack in force everywhere. Three things
keep what it forgot forgotten (docs/methods.md, "On top of a stack"): the inputs that the
lower patches act on are preserved (:func:`forgotten_moments`); so are those of the facts
that the owner gives again; and one of these that comes back gets a wish of its own
(:func:`came_back`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..client import Engine
from ..engine.stack import admit
from ..errors import BaseMismatchError, UnknownPatchError, UsageError
from ..given import resolve
from ..kernels import fold
from ..patch import Patch, check_module
from .facts import Fact, Source, read_facts
from .forward import Edit, answered, as_edit, beneath, keys
from .models import Model
from .prompts import Encoded, encode_facts
from .slopes import Wish
from .wishes import SUPPRESS

if TYPE_CHECKING:
    from .job import Job

Named = str | Path | Patch  # a file, a patch, or with an engine an id


@dataclass(frozen=True)
class Earlier:
    """Earlier forget sets that are to stay forgotten.

    ``encoded``: those that the stack has forgotten. ``given``: how many there were.
    """

    encoded: tuple[Encoded, ...] = ()
    given: int = 0


def lower_patches(
    named: Sequence[Named] = (), engine: str | Engine | None = None, token: str | None = None
) -> tuple[Patch, ...]:
    """The patches that a new one is computed on top of, the bottom first.

    Args:
        named: files or patches, or, with an engine, ids of patches that it holds.
        engine: an engine or its URL. With nothing named: its whole stack in force.
        token: the engine's, where a URL is given; None: ``$PATCHER_TOKEN``.

    Raises:
        UsageError: an id without an engine, or another order than that in force.
        InvalidPatchError: a file is damaged.
        StackConflictError: a patch twice, or one that lacks what it requires beneath it.
        UnknownPatchError: the engine holds no such patch.
        EngineUnreachableError: no answer from the engine.
    """
    if engine is None:
        patches = [_file(one) for one in named]
    elif isinstance(engine, Engine):
        patches = _of_engine(engine, named)
    else:
        with Engine(engine, token) as connection:
            patches = _of_engine(connection, named)
    admit([patch.id for patch in patches], {patch.id: patch.manifest for patch in patches})
    return tuple(patches)


def _file(named: Named) -> Patch:
    if isinstance(named, Patch):
        return named
    if not _is_file(named) and _like_an_id(str(named)):
        raise UsageError(
            f"There is no patch file {str(named)[:80]!r}.",
            "To name a patch by its id, give --engine URL too: the engine holds its bytes.",
        )
    return Patch.read(named)


def _is_file(named: str | Path) -> bool:
    try:
        return Path(named).exists()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        return False


def _like_an_id(text: str) -> bool:
    return 4 <= len(text) <= 64 and all(c in "0123456789abcdefABCDEF" for c in text)


def _of_engine(engine: Engine, named: Sequence[Named]) -> list[Patch]:
    in_force = engine.status()["stack"]
    if not named:
        return [engine.download(one) for one in in_force]
    held = [one["id"] for one in engine.patches()]

    def read(one: Named) -> Patch:
        if isinstance(one, Patch) or _is_file(one):
            return _file(one)
        try:
            return engine.download(resolve([str(one)], held)[0])
        except UnknownPatchError:
            raise UnknownPatchError(
                f"The engine holds no patch {str(one)[:64]!r}, and there is no such file.",
                "`patcher status` lists the patches that are in force.",
            ) from None

    patches = [read(one) for one in named]
    order = [in_force.index(patch.id) for patch in patches if patch.id in in_force]
    if order != sorted(order):
        raise UsageError(
            "The patches are named in another order than the engine has them in force.",
            "Name the bottom one first, as `patcher status --json` lists them.",
        )
    return patches


def served_in(patches: Sequence[Patch]) -> str:
    """The dtype that the patched weights are served in; ``auto`` where there is no patch."""
    modules = (base for patch in patches for base in patch.manifest.base.modules.values())
    return next((base.dtype for base in modules), "auto")


def edit_of(model: Model, patch: Patch) -> Edit:
    """The patch's deltas, once its base is seen to be this model.

    Raises:
        BaseMismatchError: it was computed on other weights.
    """
    for name, base in patch.manifest.base.modules.items():
        try:
            weight = model.served(name)
        except AttributeError:
            raise BaseMismatchError(
                f"The model has no {name}, which patch {patch.id[:12]} changes.",
                "Give the model that the patch was computed on.",
            ) from None
        check_module(name, base, weight)
    return as_edit(patch.deltas)


@contextmanager
def stacked(model: Model, patches: Sequence[Patch]) -> Iterator[None]:
    """The model with the patches in force, the bottom first; as it was at the end.

    Raises:
        BaseMismatchError: a patch was computed on other weights.
    """
    edits = [edit_of(model, patch) for patch in patches]
    if not edits:
        yield
        return
    with beneath(model, *edits):
        yield


def read_earlier(sources: Sequence[Source], on_top: bool) -> list[Fact]:
    """The facts of earlier forget sets, each once.

    Raises:
        UsageError: there are some, and no stack that could have forgotten them.
        ForgetSetError: a set can't be read.
    """
    if sources and not on_top:
        raise UsageError(
            "What is to stay forgotten was given, but nothing that lies beneath.",
            "Name the earlier patches with --on-top-of, or the engine with --engine.",
        )
    found = [fact for source in sources for fact in read_facts(source)]
    return list({(fact.text, fact.target): fact for fact in found}.values())


def forgotten_before(model: Model, facts: Sequence[Fact], own: Sequence[Fact]) -> Earlier:
    """Which of the earlier facts the stack beneath has forgotten; the new ones don't count."""
    new = {(fact.text, fact.target) for fact in own}
    facts = [fact for fact in facts if (fact.text, fact.target) not in new]
    encoded = encode_facts(model.tokenizer, facts, model.max_tokens)
    said = answered(model, [(one.prompt, one.answer) for one in encoded])
    gone = tuple(one for one, yes in zip(encoded, said, strict=True) if not yes)
    return Earlier(gone, len(facts))


def still_forgotten(model: Model, earlier: Earlier) -> int:
    """How many of what the stack has forgotten the model, as it is, doesn't answer."""
    said = answered(model, [(one.prompt, one.answer) for one in earlier.encoded])
    return len(said) - sum(said)


def forgotten_moments(job: Job, moments: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """What lies beneath acts on, as second moments ``{layer: [d_in, d_in]}`` float32.

    Of the keys that are recovered from the lower patches (:func:`recovered`) and of those
    of the earlier facts that were given again. A layer where there are none is left out.

    Args:
        moments: ``{layer: C [d_in, d_in]}``, the second moment of what is preserved anyway.
    """
    found: dict[int, torch.Tensor] = {}
    kept = job.earlier.encoded
    own = (
        keys(job.model, [e.prompt for e in kept], [e.subject for e in kept], list(moments))
        if kept
        else {}
    )
    for layer, moment in moments.items():
        rows = [recovered(job.model, job.model.module_name(layer), moment)]
        rows += [own[layer].double().cpu()] if own else []
        both = torch.cat(rows)
        if len(both):
            found[layer] = (both.T @ both / len(both)).float()
    return found


@torch.no_grad()
def recovered(model: Model, name: str, moment: torch.Tensor) -> torch.Tensor:
    """Keys that the patches beneath act on at one module, ``[ranks, d_in]`` float64.

    A lower delta reads the key ``k`` through its gate ``G k``: ``G = R W`` with the weight
    beneath it, or ``B`` of an additive one. Of all keys with a given reading, the most
    likely one under the statistics ``C`` is a combination of the columns of
    ``C Gᵀ (G C Gᵀ)⁻¹``; for a closed-form gate of those very statistics that span is
    exactly that of the facts' own outputs. A basis of it that is orthonormal in ``C⁻¹``
    stands for it, so that it doesn't matter how ``L R`` is factored, scaled to the mean
    square of a preserved key.

    Args:
        moment: ``C [d_in, d_in]``.
    """
    C = moment.double().cpu()
    rows = [torch.zeros(0, len(C), dtype=torch.float64)]
    for depth, edit in enumerate(model.under):
        if name not in edit:
            continue
        delta = edit[name]
        G = delta.right.double().cpu()
        if delta.kind == "multiplicative":
            below = [lower[name] for lower in model.under[:depth] if name in lower]
            G = G @ fold(model.served(name).cpu(), below).double()
        small, vectors = torch.linalg.eigh(G @ C @ G.T)
        usable = small > 1e-9 * small[-1].clamp(min=1e-300)
        basis = (vectors[:, usable] / small[usable].sqrt()).T @ G @ C
        size = basis.square().sum() / max(1, len(basis))
        rows.append(basis * (C.trace() / size.clamp(min=1e-300)).sqrt())
    return torch.cat(rows)


def came_back(model: Model, earlier: Earlier, asked: Sequence[Wish]) -> list[Wish]:
    """Wishes against what the model, as it is now, answers although it was forgotten.

    Bounds on the first tokens of answers; one that ``asked`` holds already comes again
    with a goal two nats further. Their ``fact`` is negative: they are none of the job's own.
    """
    said = answered(model, [(one.prompt, one.answer) for one in earlier.encoded])
    goals = {wish.fact: wish.goal for wish in asked if wish.fact < 0}
    return [
        Wish(one.prompt, one.answer[0], goals.get(-1 - i, SUPPRESS + 2.0) - 2.0, -1 - i)
        for i, (one, yes) in enumerate(zip(earlier.encoded, said, strict=True))
        if yes
    ]


def replaced(wishes: Sequence[Wish], returned: Sequence[Wish]) -> list[Wish]:
    """``wishes`` with those of :func:`came_back`, each in place of its weaker self."""
    again = {wish.fact for wish in returned}
    return [wish for wish in wishes if wish.fact not in again] + list(returned)
