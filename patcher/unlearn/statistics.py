"""Second moments ``E[k kᵀ]`` of what enters a down projection, kept on disk.

A moment depends on the model's weights, the layer, the tokens and the positions that
are looked at; its file is named by a digest of all of them. A file that is damaged,
or of another shape, is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load as parse
from safetensors.torch import save as render

from . import checksummed
from .forward import batches, inputs_of
from .models import Model
from .progress import Progress

VERSION = 2  # of the computation; another one never reads this one's files
ROWS = 512  # of a moment that are multiplied together: fewer, and products lose their speed


def cache_folder(folder: str | Path | None = None) -> Path:
    """``folder``, or ``$PATCHER_CACHE``, or ``~/.cache/patcher``."""
    return Path(folder or os.environ.get("PATCHER_CACHE") or Path.home() / ".cache/patcher")


def moments(
    model: Model,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[int] | None,
    layers: Sequence[int],
    *,
    cache: Path | None,
    progress: Progress,
    what: str,
) -> dict[int, torch.Tensor]:
    """``E[k kᵀ]``, ``{layer: [d_in, d_in]}`` float32 on the CPU.

    Args:
        model: the unpatched model.
        sequences: token ids.
        positions: one position of each sequence; None: the mean is over all tokens.
        layers: zero-based.
        cache: folder of the files; None: neither read nor written. Trouble with it
            (no space, no permission) only means that nothing is kept.
        progress: told of the tokens done.
        what: the name of the step.
    """
    name = _name(model, sequences, positions) if cache else ""
    found: dict[int, torch.Tensor] = {}
    for layer in layers:
        kept = _read(cache, name, layer) if cache else None
        if (
            kept is not None
            and kept.shape == (model.weight(model.module_name(layer)).shape[1],) * 2
        ):
            found[layer] = kept
    wanted = [layer for layer in layers if layer not in found]
    if wanted:
        (fresh,) = several_moments(model, sequences, [positions], wanted, progress, what)
        for layer, moment in fresh.items():
            found[layer] = moment
            if cache:
                _write(cache, name, layer, moment)
    return found


@torch.no_grad()
def several_moments(
    model: Model,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int] | None],
    layers: Sequence[int],
    progress: Progress,
    what: str,
) -> list[dict[int, torch.Tensor]]:
    """:func:`moments`, none kept, for each of ``positions``, in one pass over the sequences."""
    totals: list[dict[int, torch.Tensor]] = [{} for _ in positions]
    done, lengths = 0, [len(sequence) for sequence in sequences]
    progress.start(what, sum(lengths))
    for group in batches(lengths):
        inputs = inputs_of(model, [sequences[i] for i in group], layers)
        for total, chosen in zip(totals, positions, strict=True):
            for layer, values in inputs.items():
                k = _looked_at(values, group, lengths, chosen)
                if layer not in total:
                    total[layer] = k.new_zeros(k.shape[1], k.shape[1])
                add_products(total[layer], k)
        done += sum(lengths[i] for i in group)
        progress.step(done)
    progress.finish()
    counts = [sum(lengths) if chosen is None else len(lengths) for chosen in positions]
    return [
        {layer: _mirrored(value).div_(count).cpu() for layer, value in total.items()}
        for total, count in zip(totals, counts, strict=True)
    ]


def _looked_at(
    values: torch.Tensor,
    group: Sequence[int],
    lengths: Sequence[int],
    positions: Sequence[int] | None,
) -> torch.Tensor:
    """The keys ``[n, d_in]`` of ``values [batch, length, d_in]`` that count: padding doesn't."""
    if positions is not None:
        return values[list(range(len(group))), [positions[i] for i in group]]
    if all(lengths[i] == values.shape[1] for i in group):
        return values.flatten(0, 1)
    rows = [row for row, i in enumerate(group) for _ in range(lengths[i])]
    return values[rows, [column for i in group for column in range(lengths[i])]]


def add_products(total: torch.Tensor, k: torch.Tensor) -> None:
    """Add the lower part of ``kᵀ k`` to ``total [d_in, d_in]``: the upper one is its mirror."""
    for begin in range(0, len(total), ROWS):
        end = begin + ROWS
        total[begin:end, :end].addmm_(k[:, begin:end].T, k[:, :end])


def _mirrored(lower: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix whose lower triangle that is, in the same memory."""
    for begin in range(0, len(lower), ROWS):
        end = begin + ROWS
        lower[:begin, begin:end] = lower[begin:end, :begin].T
        own = lower[begin:end, begin:end]
        own.copy_(own.tril() + own.tril(-1).T)
    return lower


def _name(model: Model, sequences: Sequence[Sequence[int]], positions: Sequence[int] | None) -> str:
    settings = {
        "version": VERSION,
        "model": model.digest(),
        "computed": model.computed_on,
        "sequences": [list(s) for s in sequences],
        "positions": None if positions is None else list(positions),
    }
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _path(cache: Path, name: str, layer: int) -> Path:
    return cache / f"moment-{name}-{layer}.safetensors"


def _read(cache: Path, name: str, layer: int) -> torch.Tensor | None:
    try:
        body = checksummed.read(_path(cache, name, layer))
        return None if body is None else parse(body)["moment"]
    except Exception:  # whatever is wrong with it, it is computed again
        return None


def _write(cache: Path, name: str, layer: int, moment: torch.Tensor) -> None:
    checksummed.write(_path(cache, name, layer), render({"moment": moment.contiguous()}))
