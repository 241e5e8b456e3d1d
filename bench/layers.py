"""Whether ``--layers auto`` chooses well: what it predicts against a scan.

    python bench/layers.py --data DIR --facts 10 --seed 0

For windows of layers over the depth: what ``auto`` predicts that forgetting there moves,
and what it does once computed with the method ``zero``. Then Spearman's rank correlation
of the prediction with the share of others kept, with how far their answers' log-
probability moves, and with perplexity; and the choice that ``auto`` makes, computed too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from scene import Scene, aligned, effect, job_of, options, scene

from patcher.unlearn.job import Job
from patcher.unlearn.methods.zero import zero
from patcher.unlearn.tracing import Window, choose_by_evidence

STARTS = (0, 2, 3, 4, 6, 8, 10, 13, 17, 22)  # of thirty layers; others are scaled


def scanned(depth: int, args: argparse.Namespace) -> list[Window]:
    """The windows that are computed."""
    chosen = args.starts or [round(start * depth / 30) for start in STARTS]
    if args.quick:
        chosen = chosen[:: max(1, len(chosen) // 4)]
    found = [
        tuple(range(first, first + wide))
        for wide in args.wide
        for first in chosen
        if first + wide <= depth
    ]
    return list(dict.fromkeys(found))


def one(scene_: Scene, job: Job, layers: Window, predicted: float) -> dict[str, Any]:
    """What an edit in these layers does."""
    begun = time.monotonic()
    deltas = zero(replace(job, settings=replace(job.settings, layers=layers))).deltas
    seconds = time.monotonic() - begun
    return {
        "layers": list(layers),
        "predicted": round(predicted, 5),
        **effect(scene_, job, deltas),
        "seconds": round(seconds, 1),
    }


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """The correlation of the ranks; equal values share one."""

    def ranks(values: Sequence[float]) -> torch.Tensor:
        v = torch.tensor(values, dtype=torch.float64)
        return (v[None, :] < v[:, None]).sum(1) + (v[None, :] == v[:, None]).sum(1) / 2

    return float(torch.corrcoef(torch.stack([ranks(left), ranks(right)]))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options(parser, 10)
    parser.add_argument("--wide", type=int, nargs="+", default=[3], help="layers in a window")
    parser.add_argument("--starts", type=int, nargs="+", help="first layers")
    args = parser.parse_args()
    scene_ = scene(args)
    job = job_of(scene_, args)
    begun = time.monotonic()
    choice = choose_by_evidence(job, [True] * len(job.facts))
    seconds = time.monotonic() - begun
    lines = []
    for layers in dict.fromkeys([choice.layers, *scanned(job.model.layers, args)]):
        lines.append(one(scene_, job, layers, choice.moved.get(layers, float("inf"))))
        if args.json:
            print(json.dumps(lines[-1]), flush=True)
    predicted = [line["predicted"] for line in lines]
    sign = {"kept": -1, "moved": 1, "perplexity": 1}
    summary = {
        "choice": list(choice.layers),
        "by": choice.by,
        "seconds": round(seconds, 1),
        "rank_correlation": {
            name: round(s * spearman(predicted, [line[name] for line in lines]), 3)
            for name, s in sign.items()
        },
        "place_of_the_choice": 1 + sum(line["moved"] < lines[0]["moved"] for line in lines),
    }
    if not args.json:
        print(aligned(lines))
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
