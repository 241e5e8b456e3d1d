"""vLLM's internals on the worker side, read in vLLM 0.32.0; where a seam moved, it says so.

Where a linear layer's weight truly lives, how to read it back, and how to put another in its
place (``model_executor/layers/utils.py``, ``dispatch_cpu_unquantized_gemm``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch

from patcher.engine.names import find_module, refuse_experts
from patcher.errors import EngineRefusedError

_READ_ROWS = 256  # input columns read back from a pack in one product


class Staged(Protocol):
    """A new weight, ready beside the live one."""

    def commit(self) -> None:
        """Put it in the live one's place, and hold that."""

    def undo(self) -> None:
        """Put back what was live before :meth:`commit`, wherever that one stopped."""

    def read(self) -> torch.Tensor:
        """What is held beside the live weight now, ``[d_out, columns]``."""


class Columns(NamedTuple):
    """One rank's part of a target module: ``W[:, start:stop]`` of a ``[d_out, d_in]`` weight."""

    start: int
    stop: int
    d_in: int


class Site(Protocol):
    """The place where one rank's part of a target module serves."""

    columns: Columns

    def read(self) -> torch.Tensor:
        """The weight that truly serves, on the host, ``[d_out, stop - start]``."""

    def stage(self, weight: torch.Tensor) -> Staged:
        """Prepare ``weight`` (host, live dtype) beside the live one."""


class _PackSite:
    """CPU: the weight is packed inside a oneDNN handler and ``layer.weight`` is empty."""

    def __init__(self, columns: Columns, handler: Any, dtype: torch.dtype) -> None:
        self.columns = columns
        self._handler = handler
        self._dtype = dtype

    def read(self) -> torch.Tensor:
        return _read_pack(self._handler, self._dtype)

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


def _read_pack(handler: Any, dtype: torch.dtype) -> torch.Tensor:
    from vllm import _custom_ops as ops

    shape = (int(handler.n), int(handler.k))
    return _read_product(lambda x: ops.onednn_mm(handler, x, None), shape, dtype)


def _read_product(
    product: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Multiply unit vectors by a pack: one term is the weight, the rest are 0, so it is exact."""
    d_out, d_in = shape
    out = torch.empty(d_out, d_in, dtype=dtype)
    for start in range(0, d_in, _READ_ROWS):
        stop = min(start + _READ_ROWS, d_in)
        units = torch.zeros(stop - start, d_in, dtype=dtype)
        units[:, start:stop].fill_diagonal_(1)
        out[:, start:stop] = product(units).t()
    return out


class _SmallPackSite:
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

        return _read_product(
            lambda x: ops.weight_packed_linear_cpu(x, packed, self._shape[0], None),
            self._shape,
            self._dtype,
        )

    def stage(self, weight: torch.Tensor) -> Staged:
        pack = torch.ops._C.convert_weight_packed
        return _TensorStaged(self._packed, pack(weight.contiguous()), self.unpack)


class _TensorSite:
    """CUDA, or CPU without a pack: the parameter itself serves and is written in place."""

    def __init__(self, columns: Columns, weight: torch.Tensor) -> None:
        self.columns = columns
        self._weight = weight

    def read(self) -> torch.Tensor:
        return self._weight.detach().to("cpu", copy=True)

    def stage(self, weight: torch.Tensor) -> Staged:
        return _TensorStaged(self._weight.detach(), weight)


class _TensorStaged:
    def __init__(
        self,
        live: torch.Tensor,
        weight: torch.Tensor,
        unpack: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    ) -> None:
        self._live = live
        # Host memory: the device's is vLLM's, to the last block of its KV cache.
        self._spare = weight.pin_memory() if live.is_cuda else weight.clone()
        self._held = torch.empty_like(self._spare, pin_memory=live.is_cuda)
        self._holds = False
        self._unpack = unpack

    def commit(self) -> None:
        self._held.copy_(self._live)
        self._holds = True
        self._write(self._spare)

    def undo(self) -> None:
        if self._holds:
            self._write(self._held)
            self._holds = False

    def _write(self, weight: torch.Tensor) -> None:
        self._live.copy_(weight)
        if self._live.is_cuda:
            torch.cuda.synchronize(self._live.device)

    def read(self) -> torch.Tensor:
        return self._unpack(self._spare)


def find_site(model: torch.nn.Module, name: str) -> Site | None:
    """The place where module ``name`` serves on this rank; None where another rank holds it.

    Raises :class:`EngineRefusedError` for a module that can't be folded exactly.
    """
    refuse_experts(model, name)
    layer: Any = find_module(model, name)
    layer = getattr(layer, "base_layer", layer)  # vLLM's LoRA wrapper holds the real layer
    if layer is None or type(layer).__name__ == "PPMissingLayer":
        return None
    method = type(getattr(layer, "quant_method", None)).__name__
    if method != "UnquantizedLinearMethod":
        raise EngineRefusedError(
            f"Module {name} is served by {method}, whose weights can't be folded exactly.",
            "Serve the model unquantised.",
        )
    if int(getattr(layer, "tp_size", 1)) > 1 and not hasattr(layer, "input_size_per_partition"):
        raise EngineRefusedError(
            f"Module {name} is not split by its input dimension under tensor parallelism.",
            "Serve with --tensor-parallel-size 1.",
        )
    return _site_of(name, layer)


def _site_of(name: str, layer: Any) -> Site:
    d_in = int(layer.input_size)
    width = int(getattr(layer, "input_size_per_partition", d_in))
    start = width * int(getattr(layer, "tp_rank", 0)) if width != d_in else 0
    columns = Columns(start, start + width, d_in)
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


def fold_device(model: torch.nn.Module) -> torch.device:
    """Where folding is quickest: the device that the model is on."""
    return next((p.device for p in model.parameters() if p.numel()), torch.device("cpu"))


def install_on_workers(methods: Iterable[Callable[..., Any]]) -> None:
    """Add worker methods to the base class that every vLLM worker inherits.

    The worker-extension slot stays free for others. Loading twice is harmless.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    for method in methods:
        setattr(WorkerBase, method.__name__, method)
