"""Quantised modules: the patch acts on their output, read in vLLM 0.32.0.

A quantised weight can't be folded exactly, so ``L (R y)`` is added to what its module puts out
(docs/adr/0020). The buffers for it are made when the model is loaded, before graphs are: a change
copies into them, and graphs stay valid. ``model_executor/model_loader/base_loader.py`` is
where models are loaded, ``layers/quantization/base_config.py`` what computes a module's output.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from patcher.engine.sites import Columns, Staged, TensorStaged, read_product
from patcher.errors import EngineRefusedError
from patcher.kernels import LowRank, checksum, factors, overlay

# The modules that patches are of, by the last part of their name: MLP output projections.
_TARGETS = ("down_proj", "fc2", "dense_4h_to_h")
_FACTORS = "patcher_factors"  # of a layer: L, and R^T beside it
_PLAIN = "patcher_plain"  # of its method: what computes the output without them
logger = logging.getLogger("vllm.patcher")


def _overlaid_by(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What computes a module's output under its overlay, where ``plain`` does without."""

    def apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        held = getattr(layer, _FACTORS, None)
        if held is None:
            return plain(layer, x, bias)
        y = overlay(plain(layer, x, None), held)
        return y if bias is None else y + bias  # a bias stays: patches are of the weight

    return apply


class OverlaySite:
    """A rank's part of a quantised module and the factors that act on its output."""

    def __init__(self, name: str, columns: Columns, layer: Any) -> None:
        self.columns = columns
        self._name = name
        self._layer = layer
        self._factors: torch.Tensor = getattr(layer, _FACTORS)

    def base(self) -> torch.Tensor:
        """The weight as its kernel dequantises it, on the host, ``[d_out, columns]``."""
        shape = int(self._layer.output_size), self.columns.stop - self.columns.start
        device = self._factors.device

        def product(units: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = getattr(self._layer.quant_method, _PLAIN)(
                self._layer, units.to(device), None
            )
            return y.cpu()

        return read_product(product, shape, self._factors.dtype)

    def made(self, base: torch.Tensor, deltas: Sequence[LowRank]) -> torch.Tensor:
        """The base and, beside it, the factors that make ``deltas`` of it."""
        capacity = self._factors.shape[1] // 2
        rank = sum(delta.left.shape[1] for delta in deltas)
        if any(delta.kind == "additive" for delta in deltas):
            raise EngineRefusedError(
                f"Module {self._name} is quantised, and an additive delta can't act on its output.",
                "Compute the patch by a multiplicative method, or serve the model unquantised.",
            )
        if rank > capacity:
            raise EngineRefusedError(
                f"The stack has rank {rank} on {self._name}, which is quantised and has room"
                f" for {capacity}.",
                f"Start the engine with PATCHER_OVERLAY_RANK={rank} or more.",
            )
        made = factors(deltas, base.shape[0], capacity)
        return torch.cat([base, made.to(base.dtype)], dim=1)

    def read(self) -> torch.Tensor:
        """The base and the factors that serve."""
        return torch.cat([self.base(), self._factors.cpu()], dim=1)

    def checksum(self) -> int:
        """Of the base and the factors that serve."""
        return checksum(self.read())

    def stage(self, weight: torch.Tensor) -> Staged:
        """Prepare the factors of what :meth:`made` gave."""
        width = self.columns.stop - self.columns.start
        base = weight[:, :width]
        made = weight[:, width:].contiguous()
        return TensorStaged(self._factors, made, lambda held: torch.cat([base, held], dim=1))


def find_overlay(name: str, layer: Any, columns: Columns) -> OverlaySite | None:
    """Where the patches of a quantised module act; None where it was loaded without buffers."""
    return OverlaySite(name, columns, layer) if hasattr(layer, _FACTORS) else None


def is_overlay(site: object) -> bool:
    """Whether patches act on the module's output there."""
    return isinstance(site, OverlaySite)


def attach(model: torch.nn.Module, rank: int, dtype: torch.dtype) -> int:
    """Give quantised target modules of ``model`` an overlay of ``rank``; returns how many."""
    count = 0
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] not in _TARGETS or not _quantised(layer):
            continue
        device = next((t.device for t in [*layer.parameters(), *layer.buffers()]), None)
        none = torch.zeros(int(layer.output_size), 2 * rank, dtype=dtype, device=device)
        layer.register_buffer(_FACTORS, none, persistent=False)
        method = layer.quant_method
        if _PLAIN not in vars(method):  # layers may share one
            setattr(method, _PLAIN, method.apply)
            method.apply = _overlaid_by(method.apply)
        count += 1
    return count


def _quantised(layer: Any) -> bool:
    method = getattr(layer, "quant_method", None)
    splits = hasattr(layer, "input_size_per_partition") and hasattr(layer, "output_size")
    return splits and method is not None and type(method).__name__ != "UnquantizedLinearMethod"


def install(rank: int) -> None:
    """Attach overlays wherever vLLM loads a model to serve; loading twice is harmless.

    A draft model is left alone: it only proposes. The loader is imported where a worker takes its
    device (``v1/worker/worker_base.py``): half a second that no other process has to spend.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    take: Any = WorkerWrapperBase.init_device
    if rank == 0 or hasattr(take, "patcher_rank"):
        return

    @functools.wraps(take)
    def init_device(self: Any, *args: Any, **options: Any) -> Any:
        _wrap_loader(rank)
        return take(self, *args, **options)

    taking: Any = init_device
    taking.patcher_rank = rank
    WorkerWrapperBase.init_device = taking


def _wrap_loader(rank: int) -> None:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    load: Any = BaseModelLoader.load_model
    if hasattr(load, "patcher_rank"):
        return

    @functools.wraps(load)
    def load_model(
        self: Any, vllm_config: Any, model_config: Any, *args: Any, **options: Any
    ) -> Any:
        model = load(self, vllm_config, model_config, *args, **options)
        if model_config is vllm_config.model_config:
            count = attach(model, rank, model_config.dtype)
            if count:
                logger.info("patcher: %d quantised modules with overlays of rank %d", count, rank)
        return model

    attaching: Any = load_model
    attaching.patcher_rank = rank
    BaseModelLoader.load_model = attaching
