"""What a script with a patched ``vllm.LLM`` works on."""

from __future__ import annotations

from pathlib import Path

from tests.engine import families
from tests.engine.patches import merge, random_patch, weights

LAYERS = (0, 1)


class Files:
    """A tiny model, a patch on it, a checkpoint with the patch merged in, a patch on another."""

    def __init__(self, folder: Path, **config: int) -> None:
        self.model = families.save(folder / "model", **config)
        self.patch = random_patch(self.model, 1, LAYERS, scale=4.0)
        self.merged = merge(self.model, [self.patch], folder / "merged")
        held = {name: weight * 2 for name, weight in weights(self.model).items()}
        self.other = random_patch(self.model, 2, LAYERS, base=held)
        self.patch_file, self.other_file = folder / "patch.st", folder / "other.st"
        self.patch.write(self.patch_file)
        self.other.write(self.other_file)
        self.all = (self.model, self.merged, self.patch_file, self.other_file, folder / "state")
