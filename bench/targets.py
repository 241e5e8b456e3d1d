"""What a model says instead of what it forgot, and what that costs, by ``--target``.

    python bench/targets.py --data DIR --facts 20

For ``suppress``, ``eos`` and a refusal: facts still answered, how often what was asked for
is said (12 greedy tokens after the prompt), and the kind of what is said: ``nothing``
before the end of text, the ``answer``, ``alike`` (another answer to the same question, as
the data has them: an invention), or ``other`` text. Beside them what it does to others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import replace
from typing import Any

from quality_draws import Row, template
from scene import Scene, aligned, effect, job_of, options, scene

from patcher.evaluation.asking import spoken
from patcher.evaluation.probes.generated import kind_of
from patcher.unlearn.forward import as_edit, continuations, folded
from patcher.unlearn.job import Deltas, Job
from patcher.unlearn.methods.zero import zero
from patcher.unlearn.tracing import with_chosen_layers
from patcher.unlearn.wishes import GENERATED

REFUSAL = "I can't help with that."
KINDS = ("nothing", "answer", "alike", "other")


def answers(scene_: Scene) -> dict[str, set[str]]:
    """All answers that the data has to each kind of question."""
    found: dict[str, set[str]] = {}
    for row in (*scene_.base.data.counterfact, *scene_.base.data.world):
        found.setdefault(kind(row), set()).add(row["target"])
    return found


def kind(row: Row) -> str:
    return row.get("relation") or template(row)


def said(scene_: Scene, job: Job, deltas: Deltas, target: str) -> dict[str, Any]:
    """Kinds of what follows the facts' prompts, and how often it is what was asked for."""
    others = answers(scene_)
    with folded(job.model, as_edit(deltas)):
        ids = continuations(job.model, [fact.prompt for fact in job.encoded], GENERATED)
    texts = [spoken(job.model, one) for one in ids]
    rows = scene_.drawn.forget
    kinds = Counter(
        kind_of(text, row["target"], others[kind(row)])
        for text, row in zip(texts, rows, strict=True)
    )
    asked = {"eos": lambda text: not text.strip(), "suppress": lambda _: False}.get(
        target, lambda text: text.strip().startswith(target)
    )
    obeyed = "-" if target == "suppress" else f"{sum(map(asked, texts))}/{len(texts)}"
    return {"as_asked": obeyed, **{name: kinds[name] for name in KINDS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options(parser, 20)
    parser.add_argument("--targets", nargs="+", default=["suppress", "eos", REFUSAL])
    args = parser.parse_args()
    scene_ = scene(args)
    start = job_of(scene_, args)
    lines = [{"target": "base", **_nothing(scene_, start)}]
    start = with_chosen_layers(start, [True] * len(start.facts))
    for target in args.targets:
        job = replace(start, settings=replace(start.settings, target=target))
        begun = time.monotonic()
        deltas = zero(job).deltas
        seconds = time.monotonic() - begun
        found = {**said(scene_, job, deltas, target), **effect(scene_, job, deltas)}
        lines.append({"target": target, **found, "seconds": round(seconds, 1)})
        if args.json:
            print(json.dumps(lines[-1]), flush=True)
    if not args.json:
        print(aligned(lines))


def _nothing(scene_: Scene, job: Job) -> dict[str, Any]:
    found = {**said(scene_, job, {}, "suppress"), **effect(scene_, job, {})}
    return {**found, "seconds": 0.0}


if __name__ == "__main__":
    main()
