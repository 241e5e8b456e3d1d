"""The statistics that ``patcher compare --model`` measures overlaps under."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..patch import Patch
from ..patch.compare import Statistics
from .job import Settings
from .models import Model, load
from .progress import Progress, Silent
from .reference import locate_probes, reference_text, shipped_probes, windows
from .stacking import edit_of, served_in
from .statistics import cache_folder, moments


def statistics_of(
    model: str | Path,
    patches: Sequence[Patch],
    *,
    device: str = "auto",
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Statistics]:
    """Weights and second moments of the down projections that the patches change, by module.

    The moments are the means of two, both kept in the cache: of the tokens of the text
    that ships, and of the subjects' last tokens of the prompts that ship. A module that is
    no down projection of the model is left out.

    Raises:
        BaseMismatchError: a patch was computed on other weights.
        ModelError: the model can't be used.
    """
    teller = progress or Silent()
    teller.start("Loading the model", None)
    loaded = load(model, served_in(patches), device)
    teller.finish()
    for patch in patches:
        edit_of(loaded, patch)
    names = {name for patch in patches for name in patch.deltas}
    layers = [i for i in range(loaded.layers) if loaded.module_name(i) in names]
    return _statistics(loaded, layers, cache_folder(cache), teller) if layers else {}


def _statistics(
    model: Model, layers: list[int], cache: Path, progress: Progress
) -> dict[str, Statistics]:
    settings = Settings(tuple(layers))
    window = min(settings.window, model.max_tokens or settings.window)
    text = windows(model.tokenizer, reference_text(None), window, settings.text_tokens)
    probes = locate_probes(model, shipped_probes())
    what = "Statistics of the reference text", "Statistics of other subjects"
    parts = [
        moments(model, sequences, positions, layers, cache=cache, progress=progress, what=name)
        for name, sequences, positions in (
            (what[0], text, None),
            (what[1], probes.sequences, probes.positions),
        )
    ]
    return {
        model.module_name(layer): Statistics(
            model.weight(model.module_name(layer)).cpu().numpy().astype(np.float64),
            ((parts[0][layer] + parts[1][layer]) / 2).numpy().astype(np.float64),
        )
        for layer in layers
    }
