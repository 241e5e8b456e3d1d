"""vLLM's internals on the worker side, read in vLLM 0.32.0; where a seam moved, it says so.

Where a linear layer's weight truly lives, how to read it back, and how to put another in its
place (``model_executor/layers/utils.py``, ``dispatch_cpu_unquantized_gemm``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from patcher.engine.names import find_experts_of, find_module
from patcher.engine.sites import (
    Columns,
    Folded,
    Site,
    Staged,
    TensorStaged,
    probe_product,
    read_product,
)
from patcher.engine.vllm_experts import find_experts
from patcher.engine.vllm_overlay import find_overlay
from patcher.errors import EngineRefusedError
from patcher.kernels import checksum


class _PackSite(Folded):
    """CPU: the weight is packed inside a oneDNN handler and ``layer.weight`` is empty."""

    def __init__(self, columns: Columns, handler: Any, dtype: torch.dtype) -> None:
        self.columns = columns
        self._handler = handler
        self._dtype = dtype

    def read(self) -> torch.Tensor:
        return _read_pack(self._handler, self._dtype)

    def checksum(self) -> int:
        return _probe_pack(self._handler, self._dtype)

    def stage(self, weight: torch.Tensor) -> Staged:
        return _PackStaged(self._handler, weight)


class _PackStaged:
    def __init__(self, live: Any, weight: torch.Tensor) -> None:
        from vllm import _custom_ops as ops

        self._live = live
        # 32: the primitive cache size that vLLM's own dispatch uses.
        self._spare = ops.create_onednn_mm(weight.t(), 32)
        self._dtype = weight.dtype
        self._pack = int(self._spare.handler_tensor.item())

    def commit(self) -> None:
        if int(self._live.handler_tensor.item()) != self._pack:
            self._exchange()

    def undo(self) -> None:
        if int(self._live.handler_tensor.item()) == self._pack:
            self._exchange()

    def _exchange(self) -> None:
        # Graphs and closures hold the handler's tensor, so its integer is what may change.
        live, spare = self._live.handler_tensor, self._spare.handler_tensor
        held = int(live.item())
        live.fill_(int(spare.item()))
        spare.fill_(held)

    def read(self) -> torch.Tensor:
        return _read_pack(self._spare, self._dtype)

    def checksum(self) -> int:
        return _probe_pack(self._spare, self._dtype)


def _read_pack(handler: Any, dtype: torch.dtype) -> torch.Tensor:
    from vllm import _custom_ops as ops

    shape = (int(handler.n), int(handler.k))
    return read_product(lambda x: ops.onednn_mm(handler, x, None), shape, dtype)


def _probe_pack(handler: Any, dtype: torch.dtype) -> int:
    from vllm import _custom_ops as ops

    return probe_product(lambda x: ops.onednn_mm(handler, x, None), int(handler.k), dtype)


class _SmallPackSite(Folded):
    """CPU with AMX, weights up to 1 MiB: packed into a tensor that the layer's closure holds."""

    def __init__(
        self, columns: Columns, packed: torch.Tensor, d_out: int, dtype: torch.dtype
    ) -> None:
        self.columns = columns
        self._packed = packed
        self._shape = (d_out, columns.stop - columns.start)
        self._dtype = dtype

    def read(self) -> torch.Tensor:
        return self.unpack(self._packed)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """The ``[d_out, columns]`` weight inside ``packed``."""
        from vllm import _custom_ops as ops

        return read_product(
            lambda x: ops.weight_packed_linear_cpu(x, packed, self._shape[0], None),
            self._shape,
            self._dtype,
        )

    def stage(self, weight: torch.Tensor) -> Staged:
        pack = torch.ops._C.convert_weight_packed
        return TensorStaged(self._packed, pack(weight.contiguous()), self.unpack)


class _TensorSite(Folded):
    """CUDA, or CPU without a pack: the parameter itself serves and is written in place."""

    def __init__(self, columns: Columns, weight: torch.Tensor) -> None:
        self.columns = columns
        self.device = weight.device
        self._weight = weight

    def read(self) -> torch.Tensor:
        return self._weight.detach().to("cpu", copy=True)

    def checksum(self) -> int:
        """Of the live weight, where it is."""
        return checksum(self._weight)

    def stage(self, weight: torch.Tensor) -> Staged:
        return TensorStaged(self._weight.detach(), weight)


def find_site(model: torch.nn.Module, name: str) -> Site | None:
    """The place where module ``name`` serves on this rank; None where another rank holds it.

    Raises :class:`EngineRefusedError` for a module that can't be folded exactly.
    """
    experts = find_experts_of(model, name)
    layer: Any = find_module(model, name) if experts is None else experts
    layer = getattr(layer, "base_layer", layer)  # vLLM's LoRA wrapper holds the real layer
    if layer is None or type(layer).__name__ == "PPMissingLayer":
        return None
    if experts is not None:
        return find_experts(name, layer)
    if int(getattr(layer, "tp_size", 1)) > 1 and not hasattr(layer, "input_size_per_partition"):
        raise EngineRefusedError(
            f"Module {name} is not split by its input dimension under tensor parallelism.",
            "Serve with --tensor-parallel-size 1.",
        )
    method = type(getattr(layer, "quant_method", None)).__name__
    if method == "UnquantizedLinearMethod":
        return _site_of(name, layer, _columns_of(layer))
    overlay = find_overlay(name, layer, _columns_of(layer))
    if overlay is None:
        raise EngineRefusedError(
            f"Module {name} is served by {method}, whose weights can't be folded exactly,"
            " and was loaded without room for an overlay.",
            "Patch an MLP output projection, with PATCHER_OVERLAY_RANK not 0 at the start.",
        )
    return overlay


def _columns_of(layer: Any) -> Columns:
    d_in = int(layer.input_size)
    width = int(getattr(layer, "input_size_per_partition", d_in))
    start = width * int(getattr(layer, "tp_rank", 0)) if width != d_in else 0
    return Columns(start, start + width, d_in)


def _site_of(name: str, layer: Any, columns: Columns) -> Site:
    serve = getattr(layer, "cpu_linear", None)
    handler = _closed_over(serve, "handler")
    if handler is not None and hasattr(handler, "handler_tensor"):
        return _PackSite(columns, handler, layer.weight.dtype)
    packed = _closed_over(serve, "packed_weight")
    if packed is not None:
        return _SmallPackSite(columns, packed, int(layer.output_size), layer.weight.dtype)
    if layer.weight.numel() == 0:
        raise EngineRefusedError(
            f"Module {name} serves from a pack that patcher can't exchange.",
            "Serve on CUDA or on a CPU where vLLM packs with oneDNN (no zentorch).",
        )
    return _TensorSite(columns, layer.weight)


def _closed_over(function: Callable[..., Any] | None, name: str) -> Any:
    if not inspect.isfunction(function):
        return None
    return inspect.getclosurevars(function).nonlocals.get(name)


def install_on_workers(methods: Iterable[Callable[..., Any]]) -> None:
    """Add worker methods to the base class that every vLLM worker inherits.

    The worker-extension slot stays free for others. Loading twice is harmless.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    for method in methods:
        setattr(WorkerBase, method.__name__, method)
