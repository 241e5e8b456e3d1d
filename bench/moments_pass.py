"""The pass for the keys' second moments, against the bare forward pass: bench/compute.py's part."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from report import SIZES, Spread, interleaved, ratios

from patcher.unlearn.forward import batches, inputs_of
from patcher.unlearn.layers import COUNT, by_depth
from patcher.unlearn.models import load
from patcher.unlearn.progress import Silent
from patcher.unlearn.reference import reference_text, windows
from patcher.unlearn.statistics import add_products, moments

SHARE = 0.8  # of the bare forward pass's speed, the bar
WINDOW = 256  # tokens read together, as `patcher compute` reads
BATCH = 512  # tokens of the larger models' products
#: Of the larger models: what queries, keys and values put out together, and layers.
ATTENTION = {
    "Llama-3.2-3B": (3072, 1024, 28),
    "Llama-3.1-8B": (4096, 1024, 32),
    "Qwen3-32B": (8192, 1024, 64),
}


class Passed(NamedTuple):
    """Seconds of both passes, and how fast the one with statistics is beside the bare one."""

    name: str
    tokens: int
    bare: Spread
    whole: Spread
    ratio: Spread
    why: str = ""

    def row(self) -> dict[str, Any]:
        """For the document."""
        return {
            "way": f"statistics, {self.name}",
            "tokens": self.tokens,
            "seconds": round(self.whole.median, 3),
            "bare_seconds": round(self.bare.median, 3),
            "speed": f"{self.ratio.median:.2f} ({self.ratio.low:.2f}-{self.ratio.high:.2f})",
        }


def passed(name: str, tokens: int, ways: dict[str, Any], rounds: int, device: str) -> Passed:
    """Both ways, round by round."""
    settle = torch.cuda.synchronize if device == "cuda" else None
    seconds = interleaved(ways, rounds, settle=settle)
    bare, whole = seconds["bare"], seconds["whole"]
    return Passed(name, tokens, Spread.of(bare), Spread.of(whole), ratios(bare, whole))


def statistics_passes(folder: str, device: str, quick: bool) -> list[Passed]:
    """The real model's, and unless ``quick`` the larger models'."""
    return model_pass(folder, device) + ([] if quick else larger(device))


@torch.no_grad()
def model_pass(folder: str, device: str) -> list[Passed]:
    """The real model, the layers that are edited by depth, batches as `patcher compute` reads."""
    model = load(folder, device=device)
    layers = by_depth(model.layers)
    text = windows(model.tokenizer, reference_text(None), WINDOW, 4096)
    groups = [[text[i] for i in group] for group in batches([len(ids) for ids in text])]

    def bare() -> None:
        for group in groups:
            inputs_of(model, group, layers[-1:])

    ways = {
        "bare": bare,
        "whole": lambda: moments(model, text, None, layers, cache=None, progress=Silent(), what=""),
    }
    return [passed(model.name, sum(map(len, text)), ways, 5, device)]


@torch.no_grad()
def larger(device: str) -> list[Passed]:
    """Products of matrices alone, of one layer of larger models: random tensors, one batch.

    The share of layers that give statistics is that of a real pass: the last ``COUNT`` of those
    up to the last edited one.
    """
    return [_products(name, device) for name in ATTENTION]


def _products(name: str, device: str) -> Passed:
    (d, wide), (queries, values, layers) = SIZES[name], ATTENTION[name]
    make = partial(torch.full, fill_value=0.01, device=device)
    shapes = [(d, queries), (d, 2 * values), (queries, d), (d, 2 * wide), (wide, d)]
    inputs = {rows: make((BATCH, rows)) for rows in (d, queries, wide)}
    matrices = [make(shape) for shape in shapes]
    total = torch.zeros(wide, wide, device=device)

    def layer() -> None:
        for matrix in matrices:
            inputs[len(matrix)] @ matrix

    seconds = interleaved(
        {"layer": layer, "products": lambda: add_products(total, inputs[wide])},
        2,
        settle=torch.cuda.synchronize if device == "cuda" else None,
    )
    numbers = sum(matrix.numel() for matrix in matrices)
    # Layers that a pass runs: it ends before the last one's down projection.
    run = by_depth(layers)[-1] + 1 - d * wide / numbers
    bare = [run * one for one in seconds["layer"]]
    whole = [a + COUNT * b for a, b in zip(bare, seconds["products"], strict=True)]
    why = _why(run * numbers, COUNT * wide**2)
    return Passed(name, BATCH, Spread.of(bare), Spread.of(whole), ratios(bare, whole), why)


def _why(weights: float, products: int) -> str:
    """Of so many weights that a token passes, and numbers of the moments that it adds to."""
    limit = weights / (weights + products / 2)
    return (
        f"half of K Kᵀ, which is symmetric, is {1 - limit:.0%} of the pass's multiplications:"
        f" {limit:.2f} is the most. Beyond it a method would have to do with the moment of W k,"
        " [d_out, d_out]"
    )
