"""``patcher.compute``: from a forget set and a model to a patch file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..client import Engine
from ..errors import ForgetSetError, InputError, UsageError
from ..patch import Base, Manifest, Method, Patch, Requests, commitment, module_base, owner_salt
from .check import Check, Found, check
from .facts import Fact, Source, read_facts
from .forward import answered
from .job import Job, Outcome, Settings
from .journal import Journal
from .layers import choose_layers, is_auto
from .models import Model, load
from .progress import Progress, Silent
from .prompts import Encoded, encode_facts
from .reference import Probe, reference_text, shipped_probes, windows, without
from .registry import method as find_method
from .stacking import Named, forgotten_before, lower_patches, read_earlier, stacked
from .statistics import cache_folder
from .tracing import with_chosen_layers

HELD_OUT = 128  # probes that the statistics don't see: the check asks them
CHECKED_TOKENS = 1024  # of the reference text, after those that the statistics are taken from


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
            "evaluation": self.evaluation,
        }


@dataclass(frozen=True)
class Chosen:
    """The facts that an edit is made of, and how many were looked at for them."""

    facts: list[Fact]
    encoded: list[Encoded]
    known: list[bool]
    looked_at: int
    known_of_them: int


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
    preserve: Source | None = None,
    seed: int = 0,
    title: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    cache: str | Path | None = None,
    as_published: bool = False,
    orthogonal: bool = False,
    resume: bool = True,
    on_top_of: Sequence[Named] = (),
    engine: str | Engine | None = None,
    token: str | None = None,
    keep_forgotten: Sequence[Source] = (),
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
        method: ``zero``.
        layers: ``auto``, or zero-based ones as ``"3,4,5"`` or ``[3, 4, 5]``.
        reference: a text that stands for what is to be preserved; None: the one that ships.
        target: ``suppress``, ``eos``, or a text that is to be said instead.
        known_only: leave out the facts that the model doesn't know anyway.
        limit: how many facts at most; with ``known_only``, how many known ones.
        preserve: facts that are to stay, in the same form; their prompts join the statistics.
        seed: of the draw of other subjects for the facts' wordings.
        title: for people; by default it says how many facts, nothing about them.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …
        dtype: what the weights are served in; ``auto``: the checkpoint's, float32 as bfloat16.
        cache: folder for statistics; None: ``$PATCHER_CACHE`` or ``~/.cache/patcher``.
        as_published: ``zero`` as the paper's code computes it, to compare with.
        orthogonal: ``zero`` with the paper's orthogonality, on the facts' inputs.
        resume: go on from where the same computation was interrupted.
        on_top_of: patches that are in force beneath, the bottom first: files, patches, or,
            with ``engine``, ids that it holds. The new patch requires them.
        engine: a running engine or its URL: its stack in force lies beneath, or what
            ``on_top_of`` names of it.
        token: the engine's, where a URL is given; None: ``$PATCHER_TOKEN``.
        keep_forgotten: forget sets of the patches beneath, which are guarded and checked.
        progress: told what is done.

    Raises:
        ForgetSetError: the forget set, or what is to be preserved, is wrong or empty.
        InputError: the reference text can't be used.
        ModelError: the model can't be used.
        UsageError: an option is off, or ``output`` can't be written.
        BaseMismatchError: a patch beneath was computed on other weights.
        StackConflictError: the patches beneath are no stack.
    """
    begun = time.monotonic()
    teller = progress or Silent()
    run = find_method(method).load()
    _check_target(target)
    facts = read_facts(forget, None if known_only else limit)
    _check_limit(limit)
    kept = read_facts(preserve) if preserve is not None else []
    text = reference_text(reference)
    lower = lower_patches(on_top_of, engine, token)
    before = read_earlier(keep_forgotten, bool(on_top_of) or engine is not None)
    teller.start("Loading the model", None)
    loaded = load(model, dtype, device)
    teller.finish()
    settings = Settings(
        tuple(choose_layers(layers, loaded.layers)),
        target,
        seed,
        as_published=as_published,
        orthogonal=orthogonal,
    )
    with stacked(loaded, lower):
        chosen = choose(loaded, facts, known_only, limit, teller)
        job, asked = _job(loaded, chosen, settings, text, kept, cache, teller)
        job = replace(job, earlier=forgotten_before(loaded, before, chosen.facts))
        asked = replace(asked, earlier=job.earlier)
        if is_auto(layers):
            job = with_chosen_layers(job, chosen.known)
        job = replace(job, journal=_journal(job, method))
        if not resume:
            job.journal.clear()
        torch.manual_seed(seed)
        outcome = run(job)
        found = check(job, outcome.deltas, asked, chosen.known, progress=teller)
        patch = _patch(job, outcome, method, title, found, lower)
    if output is not None:
        patch.write(output)
    job.journal.clear()
    return ComputeResult(
        patch,
        None if output is None else Path(output),
        len(patch.data),
        {name: delta.rank for name, delta in patch.deltas.items()},
        chosen.looked_at,
        chosen.known_of_them,
        time.monotonic() - begun,
        found.as_dict(),
    )


def _check_target(target: str) -> None:
    if not target.strip():
        raise UsageError("The target is empty.", "Give suppress, eos or a text.")


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"The limit is {limit}.", "Give a number of facts from 1 on.")


def choose(
    model: Model, facts: Sequence[Fact], known_only: bool, limit: int | None, progress: Progress
) -> Chosen:
    """Encode facts and find out which the model knows; with ``known_only`` take only those.

    Raises:
        ForgetSetError: a fact can't be encoded; or none is known, with ``known_only``.
    """
    _check_limit(limit)
    wanted = len(facts) if limit is None else limit
    if not known_only:
        facts = facts[:wanted]
    picked: list[int] = []
    encoded: list[Encoded] = []
    known: list[bool] = []
    progress.start("What the model knows", len(facts))
    while len(known) < len(facts) and len(picked) < wanted:
        part = facts[len(known) : len(known) + 256]
        ids = encode_facts(model.tokenizer, part, model.max_tokens)
        said = answered(model, [(e.prompt, e.answer) for e in ids])
        picked += [len(known) + i for i, yes in enumerate(said) if yes or not known_only]
        encoded += ids
        known += said
        progress.step(len(known))
    progress.finish()
    picked = picked[:wanted]
    if not picked:
        raise ForgetSetError(
            f"The model knows none of the {len(facts)} facts.",
            "Leave --known-only out to compute the patch nevertheless.",
        )
    stop = picked[-1] + 1 if len(picked) == wanted else len(known)
    return Chosen(
        [facts[i] for i in picked],
        [encoded[i] for i in picked],
        [known[i] for i in picked],
        stop,
        sum(known[:stop]),
    )


def _job(
    model: Model,
    chosen: Chosen,
    settings: Settings,
    text: str,
    kept: Sequence[Fact],
    cache: str | Path | None,
    progress: Progress,
) -> tuple[Job, Check]:
    """The job, and apart from it what the check will ask."""
    window = min(settings.window, model.max_tokens or settings.window)
    pieces = windows(model.tokenizer, text, window, settings.text_tokens + CHECKED_TOKENS)
    if not pieces:
        raise InputError("The reference text has no two tokens.", "Give some thousand words.")
    aside = min(CHECKED_TOKENS // window, len(pieces) // 8)
    read, unread = (pieces[:-aside], pieces[-aside:]) if aside else (pieces, [])
    probes = without(chosen.facts, shipped_probes())
    step = max(1, len(probes) // HELD_OUT)
    asked = probes[::step][:HELD_OUT]
    probes = [probe for i, probe in enumerate(probes) if i % step or i // step >= HELD_OUT]
    owners = encode_facts(model.tokenizer, kept, model.max_tokens)
    probes += [Probe(f.prompt, f.subject or f.prompt) for f in kept if f.prompt is not None]
    settings = replace(settings, window=window)
    place = cache_folder(cache)
    job = Job(model, chosen.facts, chosen.encoded, settings, read, probes, place, progress)
    return job, Check(unread, asked, owners)


def _journal(job: Job, method: str) -> Journal:
    """Where intermediate results of exactly this computation are kept."""
    depends = {
        "model": job.model.digest(),
        "method": method,
        "settings": asdict(job.settings),
        "facts": [fact.canonical() for fact in job.facts],
        "text": [list(window) for window in job.text],
        "probes": [list(probe) for probe in job.probes],
        "earlier": [list(one) for one in job.earlier.encoded],
        "threads": torch.get_num_threads(),
    }
    name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
    return Journal(None if job.cache is None else job.cache / "jobs" / name)


def _patch(
    job: Job,
    outcome: Outcome,
    method: str,
    title: str | None,
    found: Found,
    lower: Sequence[Patch],
) -> Patch:
    model, count = job.model, len(job.facts)
    hyperparameters: dict[str, Any] = asdict(job.settings) | {
        "layers": list(job.settings.layers),
        "probes": len(job.probes),
        "read_tokens": sum(map(len, job.text)),
        **outcome.hyperparameters,
    }
    if job.settings.target not in ("suppress", "eos"):
        hyperparameters["target"] = "text"  # which one is the owner's
    manifest = Manifest(
        title=title or (f"Forget {count} facts" if count > 1 else "Forget 1 fact"),
        base=Base(
            model=model.name,
            architecture=model.class_name,
            modules={name: module_base(model.served(name)) for name in outcome.deltas},
        ),
        method=Method(name=method, hyperparameters=hyperparameters),
        requests=Requests(
            count=count,
            commitment=commitment([fact.canonical() for fact in job.facts], owner_salt()),
        ),
        requires=tuple(patch.id for patch in lower),
        evaluation=found.as_dict(),
    )
    return Patch.build(manifest, outcome.deltas)
