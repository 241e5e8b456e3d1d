"""What stands for everything that must stay: three texts, and the mixture of what is preserved.

    python bench/reference.py --data DIR --facts 20

First the reference text: one by the user (DIR's), the one that ships, one that the model
itself writes. Then, with the one that ships, the weights of the four moments: running
text, other subjects, other subjects in the facts' wordings, all tokens of these. Layers
are the same throughout.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from scene import Scene, aligned, effect, job_of, options, scene

from patcher.unlearn.check import mean_nats
from patcher.unlearn.job import Job
from patcher.unlearn.methods.zero import zero
from patcher.unlearn.progress import Silent
from patcher.unlearn.selftext import self_text
from patcher.unlearn.tracing import with_chosen_layers

Mixture = tuple[float, float, float, float]
MIXTURES: tuple[Mixture, ...] = (
    (1, 0, 0, 0),
    (1, 1, 0, 0),
    (1, 1, 1, 0),
    (1, 2, 2, 2),
    (0, 1, 1, 1),
    (0, 1, 0, 0),
)


def user_text(folder: Path) -> str:
    """The data's reference text; of the tests' data, which has none, the perplexity's."""
    file = folder / "wikitext_reference.txt"
    return (file if file.exists() else folder / "ppl.txt").read_text("utf-8")


def one(scene_: Scene, job: Job, text: str, mixture: Mixture) -> dict[str, Any]:
    """What an edit does that was computed with this text and mixture."""
    begun = time.monotonic()
    deltas = zero(replace(job, settings=replace(job.settings, mixture=mixture))).deltas
    seconds = time.monotonic() - begun
    weights = ":".join(f"{weight:g}" for weight in mixture)
    found = effect(scene_, job, deltas)
    return {"text": text, "mixture": weights, **found, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options(parser, 20)
    parser.add_argument("--texts", nargs="*", default=["shipped", "user", "self"])
    parser.add_argument("--mixtures", nargs="*", help="as 1:1:1:1")
    args = parser.parse_args()
    scene_ = scene(args)
    shipped = job_of(scene_, args)
    shipped = with_chosen_layers(shipped, [True] * len(shipped.facts))
    lines: list[dict[str, Any]] = []

    def tell(line: dict[str, Any]) -> None:
        lines.append(line)
        if args.json:
            print(json.dumps(line), flush=True)

    for name in args.texts:
        job, begun = shipped, time.monotonic()
        if name != "shipped":
            text = user_text(args.data) if name == "user" else _own(scene_, shipped, args)
            job = replace(shipped, text=job_of(scene_, args, text).text)
        wrote = time.monotonic() - begun
        line = one(scene_, job, name, (1, 1, 1, 1))
        nats = mean_nats(job.model, list(job.text)[:16])
        tell({**line, "nats_of_text": round(nats, 3), "writing": round(wrote, 1)})
    given = None if args.mixtures is None else [_mixture(m) for m in args.mixtures]
    mixtures = MIXTURES if given is None else given
    for mixture in mixtures[:2] if args.quick else mixtures:
        tell({**one(scene_, shipped, "shipped", mixture), "nats_of_text": "", "writing": 0.0})
    if not args.json:
        print(aligned(lines))


def _own(scene_: Scene, job: Job, args: argparse.Namespace) -> str:
    tokens = 4096 if args.quick else job.settings.text_tokens
    return self_text(scene_.model, tokens, args.seed, Silent(), facts=job.facts, cache=args.cache)


def _mixture(text: str) -> Mixture:
    a, b, c, d = (float(part) for part in text.split(":"))
    return a, b, c, d


if __name__ == "__main__":
    main()
