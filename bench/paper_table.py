"""The tables of the ZeroUnlearn paper, on its models and data where there are such.

    python bench/paper_table.py --mcf multi_counterfact.json --zsre zsre_mend_eval.json
    python bench/paper_table.py --models .models/smollm2-135m-instruct \\
        --mcf ../shared/data/counterfact.jsonl --samples 10 --seeds 1 --methods zero memit

As in Lin et al. 2026 (arXiv 2605.18879) and its code: facts are drawn from the second half
of a dataset, known or not. Efficacy, generalisation and specificity are what is answered
of the facts' prompts, of their paraphrases and of neighbouring prompts, in per cent: of
whole answers on MCF, of answers' tokens on ZsRE, the mean over facts. Low, low and high
are good. Given is the mean over seeds with the standard deviation. The perplexity is of
``--ppl``, a text of yours: on another one than theirs it compares with the base's alone.
Beside it stands what the paper has, where model and number of samples are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from quality import options_of

from patcher.errors import PatcherError
from patcher.evaluation.asking import Pair, judge
from patcher.evaluation.perplexity import cut, perplexity
from patcher.evaluation.readers import rows_from
from patcher.patch import Patch
from patcher.unlearn import compute
from patcher.unlearn.forward import as_edit, folded
from patcher.unlearn.models import Model, load
from patcher.unlearn.prompts import encode
from patcher.unlearn.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-4B")
LAYERS = {  # the authors' settings; a method named with --layers has its own
    "Llama-3.2-3B-Instruct": [16, 17, 18],
    "Llama-3.1-8B-Instruct": [19, 20, 21],
    "Qwen3-4B": [9, 10, 11],
}
FIGURES = ("efficacy", "generalisation", "specificity", "perplexity")
PAPER = json.loads(Path(__file__).with_name("paper_figures.json").read_text("utf-8"))
Row = dict[str, Any]


class Figures(NamedTuple):
    """Of one model: three shares in per cent (None: nothing was asked), and the perplexity."""

    efficacy: float | None
    generalisation: float | None
    specificity: float | None
    perplexity: float | None


def drawn(rows: Sequence[Row], samples: int, seed: int) -> list[Row]:
    """So many facts of the second half of the dataset."""
    half = list(rows[len(rows) // 2 :])
    return random.Random(seed).sample(half, min(samples, len(half)))


def layers_of(model: str, method: str) -> str | list[int]:
    """The published layers; ``auto`` for patcher's own default and for other models."""
    return "auto" if method == "zero" else LAYERS.get(Path(model).name, "auto")


def patch_of(model: str, method: str, rows: Sequence[Row], seed: int, folder: Path) -> Path:
    """The method's patch of those facts; one that is there already is taken.

    Raises:
        PatcherError: it can't be computed.
    """
    given = [{name: row[name] for name in ("prompt", "subject", "target")} for row in rows]
    options = {"layers": layers_of(model, method), **options_of(method)}
    named = json.dumps([model, options, given, seed], sort_keys=True)
    path = folder / f"{hashlib.sha256(named.encode()).hexdigest()[:24]}.st"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        compute(model, given, path, seed=seed, **options)
    return path


def measured(model: Model, rows: Sequence[Row], text: str | None, by_token: bool) -> Figures:
    """The figures of the model as it is now."""
    return Figures(
        share(model, [[(row["prompt"], row["target"])] for row in rows], by_token),
        share(model, [paraphrases(row) for row in rows], by_token),
        share(model, [neighbours(row) for row in rows], by_token),
        None if text is None else perplexity(model, cut(model, text)),
    )


def paraphrases(row: Row) -> list[tuple[str, str]]:
    texts = [*([row["rephrase"]] if row.get("rephrase") else []), *row.get("paraphrases", [])]
    return [(text, row["target"]) for text in texts]


def neighbours(row: Row) -> list[tuple[str, str]]:
    found = [(one["prompt"], one["target"]) for one in row.get("neighbours", [])]
    if row.get("locality") and row.get("locality_target"):
        found.append((row["locality"], row["locality_target"]))
    return found


def share(model: Model, facts: Sequence[list[tuple[str, str]]], by_token: bool) -> float | None:
    """What is answered, in per cent: the mean over the facts that have such prompts."""
    pairs: list[Pair] = [encode(model.tokenizer, *one) for fact in facts for one in fact]
    said = iter(judge(model, pairs))
    scores = []
    for fact in facts:
        ranks = [next(said).ranks for _ in fact]
        if by_token:
            hits = [rank == 1 for one in ranks for rank in one]
        else:
            hits = [all(rank == 1 for rank in one) for one in ranks]
        if hits:
            scores.append(100 * fmean(hits))
    return fmean(scores) if scores else None


@contextmanager
def patched(model: Model, path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with folded(model, as_edit(Patch.read(path).deltas)):
        yield


def column(
    model: str, rows: Sequence[Row], samples: int, by_token: bool, args: argparse.Namespace
) -> dict[str, list[Figures]]:
    """Of the base and each method the figures, one a seed. What fails is told and left out."""
    facts = {seed: drawn(rows, samples, seed) for seed in args.seeds}
    patches: dict[tuple[str, int], Path | None] = {("base", seed): None for seed in facts}
    for seed, chosen in facts.items():
        for method in args.methods:
            try:
                patches[method, seed] = patch_of(model, method, chosen, seed, args.patches)
            except PatcherError as error:
                print(f"{method}, seed {seed}: {error}", file=sys.stderr, flush=True)
    loaded = load(model)  # only now: never two at a time
    found: dict[str, list[Figures]] = {}
    for (method, seed), path in patches.items():
        with patched(loaded, path):
            figures = measured(loaded, facts[seed], args.text, by_token)
        found.setdefault(method, []).append(figures)
    return found


def told(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "–"
    if fmean(there) > 1000:
        return ">1000"
    return f"{fmean(there):.2f}±{pstdev(there):.2f}"


def table(model: str, dataset: str, samples: int, found: dict[str, list[Figures]]) -> str:
    """Markdown; with the paper's figures where it has that model, dataset and count."""
    name = Path(model).name
    theirs = PAPER["figures"].get(name, {}).get(dataset, {}) if samples == PAPER["samples"] else {}
    heads = ["method", *FIGURES, *([f"paper: {one}" for one in FIGURES] if theirs else [])]
    seeds = max(map(len, found.values()))
    lines = [f"### {name}, {dataset}, {samples} samples, {seeds} seeds", ""]
    lines += [row(heads), row(["---"] * len(heads))]
    for method, figures in found.items():
        cells = [told([getattr(one, figure) for one in figures]) for figure in FIGURES]
        cells += theirs.get(method, ["–"] * len(FIGURES)) if theirs else []
        lines.append(row([method, *cells]))
    if theirs:
        lines += ["", f"Paper: {PAPER['source']}."]
    return "\n".join([*lines, ""])


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), help="directories or hub ids")
    add("--mcf", type=Path, help="CounterFact or MCF, as published or as JSON Lines")
    add("--zsre", type=Path, help="ZsRE, likewise")
    add("--methods", nargs="+", default=[*METHODS, "zero --as-published"])
    add("--samples", type=int, nargs="+", default=[10, 50, 100, 1000])
    add("--seeds", type=int, nargs="+", default=list(range(1, 11)))
    add("--ppl", type=Path, default=ROOT / "tests/data/ppl.txt")
    add("--characters", type=int, default=100_000, help="of that text")
    add("--patches", type=Path, default=ROOT / "build/paper", help="where patches are kept")
    args = parser.parse_args(words)
    args.text = args.ppl.read_text("utf-8")[: args.characters]
    datasets = {name: getattr(args, name) for name in ("mcf", "zsre") if getattr(args, name)}
    if not datasets:
        parser.error("give --mcf or --zsre")
    for model in args.models:
        for dataset, path in datasets.items():
            rows = rows_from(path)
            for samples in args.samples:
                found = column(model, rows, samples, dataset == "zsre", args)
                print(table(model, dataset, samples, found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
