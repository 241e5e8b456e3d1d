"""``patcher.compute``: from a forget set and a model to a patch file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..client import Engine
from ..errors import UsageError
from ..patch import Patch, owner_salt
from ..patch.files import check_place
from ..patch.manifest import check_title, timestamp
from .attempts import attempt
from .bars import Bars, missed, not_met
from .check import Found, unpatched
from .choosing import (
    check_agreement,
    check_limit,
    check_seed,
    check_target,
    check_target_tokens,
    choose,
    tell_unknown,
)
from .facts import Source, read_facts
from .job import Settings
from .layers import choose_layers, is_auto
from .manifesting import as_patch, evaluation
from .memory import enough, needed
from .models import load, place
from .preparing import prepare
from .progress import Progress, Silent
from .reference import reference_text
from .registry import method as find_method
from .selftext import self_text
from .stability import finite_weights
from .stacking import Named, forgotten_before, lower_patches, read_earlier, stacked
from .statistics import cache_folder
from .tracing import with_chosen_layers

SELF_TOKENS = 20_000  # that the model writes for ``reference="self"``


@dataclass(frozen=True)
class ComputeResult:
    """A computed patch and what was measured of it.

    ``path`` and ``bytes``: the file, None where none was asked for, and its size.
    ``modules``: ranks by module. ``facts``: how many were read; ``known``: how many of
    them the model answers without the patch. ``seconds``: all of it, loading included.
    ``evaluation``: counts before and after, as in the manifest.
    """

    patch: Patch
    path: Path | None
    bytes: int
    modules: dict[str, int]
    facts: int
    known: int
    seconds: float
    evaluation: dict[str, Any]

    @property
    def met(self) -> bool:
        """Whether all bars hold that were given."""
        return all(bar["met"] for bar in self.evaluation["bars"].values())

    @property
    def id(self) -> str:
        """The patch's id."""
        return self.patch.id

    def as_dict(self) -> dict[str, Any]:
        """The document of ``patcher compute --json``."""
        return {
            "id": self.id,
            "path": None if self.path is None else str(self.path),
            "bytes": self.bytes,
            "modules": self.modules,
            "facts": self.facts,
            "known": self.known,
            "seconds": round(self.seconds, 3),
            "bars": self.evaluation["bars"],
            "met": self.met,
            "evaluation": self.evaluation,
        }


def compute(
    model: str | Path,
    forget: Source,
    output: str | Path | None = None,
    *,
    method: str = "zero",
    layers: str | Sequence[int] = "auto",
    reference: str | Path | None = None,
    target: str = "suppress",
    known_only: bool = False,
    limit: int | None = None,
    retain: Source | None = None,
    seed: int = 0,
    title: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    cache: str | Path | None = None,
    as_published: bool = False,
    orthogonal: bool = False,
    augment: bool = False,
    bars: Bars | None = None,
    resume: bool = True,
    on_top_of: Sequence[Named] = (),
    engine: str | Engine | None = None,
    token: str | None = None,
    keep_forgotten: Sequence[Source] = (),
    ignore_memory: bool = False,
    progress: Progress | None = None,
) -> ComputeResult:
    """Compute the patch that makes a model forget, and check it as it will be served.

    The model itself is not changed. Same arguments, seed, number of threads and
    ``SOURCE_DATE_EPOCH`` give the same bytes.

    >>> import patcher
    >>> result = patcher.compute("my-model", "forget.jsonl", "forget.st")
    >>> result.evaluation["answered"] <= result.known <= result.facts
    True

    Args:
        model: a directory or a hub id.
        forget: a JSON Lines file of facts, or the rows (docs/methods.md).
        output: where the patch file goes; None: nowhere.
        method: by its name (``patcher methods``).
        layers: ``auto``, or zero-based ones as ``"3,4,5"`` or ``[3, 4, 5]``.
        reference: a text that stands for what is to be preserved; ``self``: one that the
            model writes; None: the one that ships.
        target: ``suppress``, ``eos``, or a text that is to be said instead.
        known_only: leave out the facts that the model doesn't know anyway.
        limit: how many facts at most; with ``known_only``, how many known ones.
        retain: facts that are to stay, in the same form; their prompts join the
            statistics, and ``zero`` and what is trained is held to what the model says now.
        seed: of the draw of other subjects for the facts' wordings.
        title: for people; by default it says how many facts, nothing about them.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …
        dtype: what the weights are served in; ``auto``: the checkpoint's, float32 as bfloat16.
        cache: folder for statistics; None: ``$PATCHER_CACHE`` or ``~/.cache/patcher``.
        as_published: ``zero`` as the paper's code computes it, to compare with.
        orthogonal: ``zero`` with the paper's orthogonality, on the facts' inputs.
        augment: learn from the facts' other wordings and generated prefixes too.
        bars: bounds to keep within; what misses one is solved for again.
        resume: go on from where the same computation was interrupted.
        on_top_of: patches that are in force beneath, the bottom first: files, patches, or,
            with ``engine``, ids that it holds. The new patch requires them.
        engine: a running engine or its URL: its stack in force lies beneath, or what
            ``on_top_of`` names of it.
        token: the engine's, where a URL is given; None: ``$PATCHER_TOKEN``.
        keep_forgotten: forget sets of the patches beneath, which are guarded and checked.
        ignore_memory: begin even where more memory is needed than there is.
        progress: told what is done.

    Raises:
        BarsNotMetError: not all bars hold. The best attempt is written nevertheless, and is
            the error's ``result``.
        ForgetSetError: the forget set, or what is to be preserved, is wrong or empty, or
            the two contradict each other.
        InputError: the reference text can't be used.
        NotEnoughMemoryError: more is needed than there is.
        NumericalError: something is not finite, or no stable solve is possible.
        ModelError: the model can't be used.
        UsageError: an option is off, or ``output`` can't be written.
        BaseMismatchError: a patch beneath was computed on other weights.
        StackConflictError: the patches beneath are no stack.
    """
    begun = time.monotonic()
    teller, bars = progress or Silent(), bars or Bars()
    entry = find_method(method)
    if (as_published or orthogonal) and method != "zero":
        raise UsageError(
            f"The method {method} has no such form.", "These forms are of the method zero."
        )
    if as_published and orthogonal:
        raise UsageError("As published, or orthogonal on the facts' inputs?", "Give one.")
    check_limit(limit)
    check_seed(seed)
    check_title(title)
    if output is not None:
        check_place(output)
    owner_salt(), timestamp()  # what the manifest will need: better now than after an hour
    facts = read_facts(forget, None if known_only else limit)
    check_target(target, facts)
    kept = read_facts(retain) if retain is not None else []
    check_agreement(facts, kept)
    text = None if reference == "self" else reference_text(reference)
    lower = lower_patches(on_top_of, engine, token)
    before = read_earlier(keep_forgotten, bool(on_top_of) or engine is not None)
    if not ignore_memory:
        enough(needed(model), place(device))
    teller.start("Loading the model", None)
    loaded = load(model, dtype, device)
    teller.finish()
    finite_weights(loaded)
    check_target_tokens(loaded.tokenizer, target)
    settings = Settings(
        tuple(choose_layers(layers, loaded.layers)),
        target,
        seed,
        as_published=as_published,
        orthogonal=orthogonal,
        augment=augment,
    )
    with stacked(loaded, lower):
        chosen = choose(loaded, facts, known_only, limit, teller)
        tell_unknown(chosen, known_only)
        if text is None:
            place_of = cache_folder(cache)
            text = self_text(loaded, SELF_TOKENS, seed, teller, facts=chosen.facts, cache=place_of)
        job, asked = prepare(loaded, chosen, settings, text, kept, cache, teller)
        job = replace(job, earlier=forgotten_before(loaded, before, chosen.facts))
        asked = replace(asked, earlier=job.earlier)
        if is_auto(layers):
            job = with_chosen_layers(job, chosen.known)
        base = unpatched(job, asked)
        bars.measurable(Found(base, base, chosen.known, 0, "").shares)
        tried = attempt(job, entry, asked, base, chosen.known, bars, resume=resume)
        patch = as_patch(tried, method, title, lower)
    if output is not None:
        patch.write(output)
    tried.settle()
    result = ComputeResult(
        patch,
        None if output is None else Path(output),
        len(patch.data),
        {name: delta.rank for name, delta in patch.deltas.items()},
        chosen.looked_at,
        chosen.known_of_them,
        time.monotonic() - begun,
        evaluation(tried),
    )
    if missed(tried.reached):
        error = not_met(tried.reached, tried.attempts)
        error.result = result
        raise error
    return result
