"""The patch file of a computation: its deltas, and what its manifest says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..patch import Base, Manifest, Method, Patch, Requests, commitment, module_base, owner_salt
from .attempts import Tried
from .bars import as_document


def evaluation(tried: Tried) -> dict[str, Any]:
    """The manifest's ``evaluation``: counts, bars and how many attempts there were."""
    found = tried.found.as_dict()
    return {**found, "bars": as_document(tried.reached), "attempts": tried.attempts}


def as_patch(tried: Tried, method: str, title: str | None, lower: Sequence[Patch]) -> Patch:
    """The patch of the best attempt; ``lower``: what lies beneath it."""
    job, deltas = tried.job, tried.outcome.deltas
    model, count = job.model, len(job.facts)
    hyperparameters: dict[str, Any] = asdict(job.settings) | {
        "layers": list(job.settings.layers),
        "mixture": list(job.settings.mixture),
        "probes": len(job.probes),
        "read_tokens": sum(map(len, job.text)),
        "condition": {str(layer): value for layer, value in sorted(job.conditions.items())},
        "extra_layers": list(job.extra_layers),
        "firmer": {"facts": len(job.firmer), "nats": max(job.firmer.values(), default=0.0)},
        **tried.outcome.hyperparameters,
    }
    if job.settings.target not in ("suppress", "eos"):
        hyperparameters["target"] = "text"  # which one is the owner's
    manifest = Manifest(
        title=title or (f"Forget {count} facts" if count > 1 else "Forget 1 fact"),
        base=Base(
            model=model.name,
            architecture=model.class_name,
            modules={name: module_base(model.served(name)) for name in deltas},
        ),
        method=Method(name=method, hyperparameters=hyperparameters),
        requests=Requests(
            count=count,
            commitment=commitment([fact.canonical() for fact in job.facts], owner_salt()),
        ),
        requires=tuple(patch.id for patch in lower),
        evaluation=evaluation(tried),
    )
    return Patch.build(manifest, deltas)
