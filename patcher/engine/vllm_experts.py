"""Where a mixture's experts serve, read in vLLM 0.32.0.

vLLM fuses the output projections of all experts of a layer into one tensor
(``model_executor/layers/fused_moe/routed_experts.py``). To a patch they are one weight, so that
one ``D`` on it is ``D`` on what the mixture puts out: the columns of all experts, those with
the same number side by side (docs/format.md). A tensor-parallel rank then holds neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from patcher.engine.sites import Columns, Folded, Site, Staged, TensorStaged
from patcher.errors import EngineRefusedError

# They compute on the tensor as it was loaded; others shuffle it (oracle/unquantized.py).
_PLAIN = ("TRITON", "BATCHED_TRITON", "FLASHINFER_CUTLASS")
# For these act(64) is 64 exactly, so act(64) * (1/64) is a unit.
_GATES = ("silu", "gelu", "gelu_tanh")
_GATE = 64.0


class _Shape(NamedTuple):
    """One rank's part of the experts of a layer, without the kernel's padding."""

    experts: int
    d_out: int
    width: int  # input columns of one expert


class _ExpertsSite(Folded):
    """The experts' tensor ``[experts, d_out, width]``, plain or as the CPU's kernel packs it."""

    def __init__(
        self,
        shape: _Shape,
        columns: Columns,
        live: torch.Tensor,
        pack: Callable[[torch.Tensor], torch.Tensor],
        unpack: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.columns = columns
        self.device = live.device
        self._shape = shape
        self._live = live
        self._pack = pack
        self._unpack = unpack

    def read(self) -> torch.Tensor:
        return self._matrix(self._live)

    def stage(self, weight: torch.Tensor) -> Staged:
        experts, d_out, width = self._shape
        stacked = weight.view(d_out, width, experts).permute(2, 0, 1).contiguous()
        return TensorStaged(self._live, self._pack(stacked), self._matrix)

    def _matrix(self, held: torch.Tensor) -> torch.Tensor:
        """``[d_out, width * experts]`` of what is held, on the host."""
        return self._unpack(held).permute(1, 2, 0).flatten(1)


def find_experts(name: str, runner: Any) -> Site:
    """The place where the experts that ``runner`` (vLLM's ``MoERunner``) runs serve.

    Raises :class:`EngineRefusedError` where their weights can't be folded exactly.
    """
    layer = runner.routed_experts
    config, method = layer.moe_config, type(layer.quant_method).__name__
    if method != "UnquantizedFusedMoEMethod":
        raise EngineRefusedError(
            f"The experts of {name} are served by {method}, whose weights can't be folded exactly.",
            "Serve the model unquantised.",
        )
    if layer.use_ep or layer.local_num_experts != config.num_logical_experts:
        raise EngineRefusedError(
            f"The experts of {name} are spread over ranks, or kept twice.",
            "Serve without --enable-expert-parallel; tensor parallelism divides each expert.",
        )
    shape = _Shape(
        layer.local_num_experts,
        config.hidden_dim_unpadded,
        config.intermediate_size_per_partition_unpadded,
    )
    parallel = config.moe_parallel_config
    own = shape.width * shape.experts
    start = own * parallel.tp_rank
    columns = Columns(start, start + own, own * parallel.tp_size)
    backend = layer.quant_method.unquantized_backend.name
    if backend == "CPU":
        return _packed(name, layer, shape, columns)
    if backend not in _PLAIN:
        raise EngineRefusedError(
            f"The experts of {name} run on {backend}, which shuffles their weights.",
            "Serve with --moe-backend triton.",
        )
    live = layer.w2_weight.detach()[:, : shape.d_out, : shape.width]
    return _ExpertsSite(shape, columns, live, torch.clone, lambda held: held.to("cpu"))


def _packed(name: str, layer: Any, shape: _Shape, columns: Columns) -> Site:
    """CPU: ``CPUUnquantizedExperts`` in ``experts/cpu_moe.py``."""
    from vllm import _custom_ops as ops

    kernel = layer.quant_method.moe_kernel.fused_experts
    activation = str(layer.activation.value)
    if getattr(kernel, "_use_zentorch", False) or activation not in _GATES:
        raise EngineRefusedError(
            f"The experts of {name} serve from a pack that patcher can't read ({activation}).",
            "Serve on CUDA, or on a CPU without zentorch a model whose experts use SiLU or GELU.",
        )
    live = layer.w2_weight.detach()
    padding = live.shape[2] - shape.width

    def pack(stacked: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = ops.cpu_prepack_moe_weight(pad(stacked, (0, padding)), kernel.isa)
        return packed

    def unpack(held: torch.Tensor) -> torch.Tensor:
        read = [_read_pack(expert, kernel.isa, activation) for expert in held]
        return torch.stack(read)[:, :, : shape.width]

    return _ExpertsSite(shape, columns, live, pack, unpack)


def _read_pack(packed: torch.Tensor, isa: str, activation: str) -> torch.Tensor:
    """The ``[d_out, width]`` weight of one expert inside its pack, exactly.

    The pack has no inverse, but its kernel runs on any first projection: on one whose activations
    are the unit vectors it puts out the weight's columns.
    """
    from vllm import _custom_ops as ops

    d_out, width = packed.shape
    out = torch.empty(d_out, width, dtype=packed.dtype)
    tokens = torch.eye(d_out, dtype=packed.dtype)
    for start in range(0, width, d_out):
        units = min(d_out, width - start)
        gate_up = torch.zeros(1, 2 * width, d_out, dtype=packed.dtype)
        gate_up[0, :width] = _GATE
        gate_up[0, width + start : width + start + units, :units].fill_diagonal_(1 / _GATE)
        product = torch.empty(units, d_out, dtype=packed.dtype)
        ops.cpu_fused_moe(
            product,
            tokens[:units],
            ops.cpu_prepack_moe_weight(gate_up, isa),
            packed[None],
            None,
            None,
            torch.ones(units, 1),
            torch.zeros(units, 1, dtype=torch.int32),
            activation,
            isa,
        )
        out[:, start : start + units] = product.t()
    return out
