"""A checkpoint on the disk: its safetensors files, read one tensor at a time.

A weight is seen as patch files see it, ``[d_out, d_in]`` (docs/format.md), however many
tensors of the checkpoint it is made of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ModelError, UsageError
from ..unlearn.models import (
    ARCHITECTURES,
    DTYPES,
    Architecture,
    configuration,
    quiet,
    resolve,
    served_dtype,
    title,
)

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_LONGEST_HEADER = 100_000_000  # safetensors' own bound
# Folders of a hub's repository hold other formats and originals: never needed, often large.
_NOT_WANTED = ["*/*", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]
_CURE = "Give a complete local directory (config.json, safetensors) or a hub id."


class Stored(NamedTuple):
    """Where a tensor's bytes lie: ``file[begin:end]``; ``dtype`` as safetensors names it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """A model's files: ``tensors`` by the names that they have there."""

    folder: Path
    name: str  # what a manifest says
    config: Any  # transformers' PretrainedConfig
    shards: tuple[Path, ...]
    tensors: Mapping[str, Stored]

    @property
    def class_name(self) -> str:
        """The class that vLLM knows the model by."""
        return str((getattr(self.config, "architectures", None) or ["unknown"])[0])

    @property
    def architecture(self) -> Architecture | None:
        """Where its family keeps things; None for a family that ``compute`` doesn't know."""
        return ARCHITECTURES.get(self.config.model_type)

    @property
    def transposed(self) -> bool:
        """Whether linear weights are stored ``[d_in, d_out]`` (GPT-2's ``Conv1D``)."""
        return self.architecture is not None and self.architecture.transposed

    def served(self, dtype: str) -> torch.dtype:
        """The dtype of that name; ``auto``: what vLLM serves this checkpoint in.

        Raises:
            UsageError: an unknown name.
        """
        if dtype == "auto":
            return served_dtype(self.config)
        if dtype not in DTYPES:
            raise UsageError(f"Unknown dtype {dtype!r}.", f"Choose auto or {', '.join(DTYPES)}.")
        return DTYPES[dtype]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it is stored; of a dtype that isn't in :data:`FLOATS`, its bytes."""
        at = self.tensors[name]
        data = bytearray(at.end - at.begin)
        with at.file.open("rb") as file:
            file.seek(at.begin)
            file.readinto(data)
        raw = (
            torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        )
        return raw.view(FLOATS[at.dtype]).reshape(at.shape) if at.dtype in FLOATS else raw

    @cached_property
    def by_module_name(self) -> dict[str, str]:
        """``{name as transformers has it: name in the files}``.

        Base models of some families are stored without their head's prefix: ``h.0.…`` for
        ``transformer.h.0.…``.
        """
        prefix = self.architecture.layers.partition(".")[0] + "." if self.architecture else ""
        bare = not any(name.startswith(prefix) for name in self.tensors)
        return {prefix + name if bare else name: name for name in self.tensors}

    def parts(self, module: str) -> list[str]:
        """The names, in the files, of the tensors that the module's weight is made of.

        One; of a mixture's experts that are stored apart, one each, in their order; nothing
        where there is no such module.
        """
        names = self.by_module_name
        for spelled in _spellings(module):
            for own in (f"{spelled}.weight", spelled):
                if own in names:
                    return [names[own]]
            mixture, found, inner = spelled.rpartition(".experts.")
            if found:
                each = (f"{mixture}.experts.{number}.{inner}.weight" for number in count())
                apart = [names[one] for one in takewhile(names.__contains__, each)]
                if apart:
                    return apart
        return []

    def weight(self, module: str) -> torch.Tensor | None:
        """The module's weight, ``[d_out, d_in]`` in the stored dtype; None: there is none.

        Raises:
            ModelError: it is not made of matrices of bfloat16, float16 or float32.
        """
        names = self.parts(module)
        if not names:
            return None
        kinds = {(self.tensors[name].dtype, self.tensors[name].shape) for name in names}
        stored, shape = next(iter(kinds))
        if len(kinds) > 1 or stored not in FLOATS or len(shape) not in (2, 3):
            raise ModelError(
                f"The weight of {module} is stored as {stored}, shape {shape}.",
                "Give a checkpoint whose weights are bfloat16, float16 or float32, not quantised.",
            )
        if len(names) > 1 or len(shape) == 3:
            held = [self.tensor(name) for name in names]
            stacked = torch.stack(held) if len(shape) == 2 else held[0]
            return stacked.permute(1, 2, 0).flatten(1)  # docs/format.md, mixtures of experts
        weight = self.tensor(names[0])
        return weight.T if self.transposed else weight

    def taken_apart(self, module: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The inverse of :meth:`weight`: name in the files and tensor as it is stored there."""
        names = self.parts(module)
        shape = self.tensors[names[0]].shape
        if len(names) > 1 or len(shape) == 3:
            experts = len(names) if len(shape) == 2 else shape[0]
            stacked = weight.view(weight.shape[0], -1, experts).permute(2, 0, 1)
            yield from zip(names, stacked if len(shape) == 2 else [stacked], strict=True)
        else:
            yield names[0], weight.T if self.transposed else weight


def open_checkpoint(model: str | Path) -> Checkpoint:
    """The checkpoint of a directory or a hub id; of its tensors only the headers are read.

    Raises:
        ModelError: no such model, quantised, not in safetensors, damaged, or with an adapter.
    """
    name = resolve(model)
    folder = Path(name) if Path(name).is_dir() else _downloaded(name)
    with quiet():
        config = configuration(str(folder))
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"The checkpoint {title(name)} is quantised: its weights can't be folded exactly.",
            "Give the checkpoint that it was quantised from.",
        )
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"The checkpoint {title(name)} has an adapter beside it, which programs would load.",
            "Move adapter_config.json and its weights away, or merge them first.",
        )
    shards = _shards(folder)
    tensors = {name: at for shard in shards for name, at in _header(shard).items()}
    return Checkpoint(folder, title(name), config, shards, tensors)


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=_NOT_WANTED))
    except Exception as error:  # whatever the library raises, the cause is the model given
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"The model {name} can't be loaded: {reason[:300]}", _CURE) from None


def _shards(folder: Path) -> tuple[Path, ...]:
    one, index = folder / ONE_FILE, folder / INDEX
    if one.is_file() and index.is_file():
        raise ModelError(
            f"{folder} holds {ONE_FILE} and {INDEX}: programs differ in which they load.",
            "Move one of them away.",
        )
    if one.is_file():
        return (one,)
    if not index.is_file():
        raise ModelError(f"{folder} holds neither {ONE_FILE} nor {INDEX}.", _CURE)
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        inside = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        names, inside = [], False
    if not names or not inside:
        raise ModelError(f"{index} is no index of safetensors files beside it.", _CURE)
    lacking = next((name for name in names if not (folder / name).is_file()), None)
    if lacking is not None:
        raise ModelError(f"{folder} lacks {lacking}, which its index names.", _CURE)
    return tuple(folder / name for name in names)


def _header(shard: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, their bytes' places checked against its size."""
    try:
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError("its header is too long")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        size = shard.stat().st_size
        found = {name: _stored(shard, one, 8 + length) for name, one in entries.items()}
        if any(not 8 + length <= at.begin <= at.end <= size for at in found.values()):
            raise ValueError("it is cut off")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{shard} is no sound safetensors file: {error}.", _CURE) from None
    return found


def _stored(shard: Path, entry: Mapping[str, Any], start: int) -> Stored:
    begin, end = (start + int(offset) for offset in entry["data_offsets"])
    dtype, shape = str(entry["dtype"]), tuple(int(side) for side in entry["shape"])
    if dtype in FLOATS and end - begin != math.prod(shape) * FLOATS[dtype].itemsize:
        raise ValueError("a tensor's bytes do not fit its shape")
    return Stored(shard, dtype, shape, begin, end)


def _spellings(module: str) -> list[str]:
    """Names that a checkpoint may have for a module; the digest tells a wrong guess."""
    inner = module.removeprefix("model.")
    return [module, f"language_model.{module}", f"model.language_model.{inner}"]
