"""An engine client over real worker code and small layers; anything in it can be made to fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from patcher.engine import vllm_core, worker

RANKS = 2
D_OUT, D_IN = 8, 48


class UnquantizedLinearMethod:
    """Found by its name, as vLLM's is."""


class Row(torch.nn.Module):
    """What vLLM's RowParallelLinear has, for one shard of the input columns."""

    def __init__(self, weight: torch.Tensor, rank: int, ranks: int) -> None:
        super().__init__()
        width = weight.shape[1] // ranks
        part = weight[:, rank * width : (rank + 1) * width].clone()
        self.weight = torch.nn.Parameter(part, requires_grad=False)
        self.quant_method = UnquantizedLinearMethod()
        self.output_size, self.input_size = weight.shape
        self.input_size_per_partition = width
        self.tp_rank, self.tp_size = rank, ranks


class FakeWorker:
    def __init__(self, weights: list[torch.Tensor], rank: int, ranks: int) -> None:
        self.rank = rank
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([Row(w, rank, ranks) for w in weights])

    def get_model(self) -> torch.nn.Module:
        return self.model


class FakeCore:
    """One engine core with real calls of ours over a scheduler that only holds ``requests``."""

    def __init__(self, client: FakeClient) -> None:
        self._client = client
        self.scheduler = SimpleNamespace(requests={}, running=[])
        self.model_executor = SimpleNamespace(sleeping_tags=set[str]())

    def play(self, *requests: SimpleNamespace) -> None:
        """Run ``requests``, which have an id and a number of tokens."""
        self.scheduler.running = list(requests)
        self.scheduler.requests = {r.request_id: r for r in requests}

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        if method == "collective_rpc":
            return [await self._client.collective_rpc(args[0], args[2])]
        return [getattr(vllm_core, method)(self, *args)]


class FakeClient:
    """``ranks`` workers behind vLLM's engine-client methods.

    ``fail[(method, rank)]`` is called instead of that method on that rank; ``resumed`` has
    the whole live weights at each time that the engine was let go on.
    """

    def __init__(self, weights: list[torch.Tensor], ranks: int) -> None:
        self.engine_core = FakeCore(self)
        self.workers = [FakeWorker(weights, rank, ranks) for rank in range(ranks)]
        self.fail: dict[tuple[str, int], Callable[..., Any]] = {}
        self.flushes: list[bool | Exception] = []  # what the next flushes answer; then True
        self.log: list[str] = []
        self.resumed: list[list[torch.Tensor]] = []
        self.stopped = False
        self.version = "default"
        self.drains = True
        self.hangs: set[str] = set()  # methods that a rank never answers

    def live(self) -> list[torch.Tensor]:
        """Each module's weight, put together from the ranks."""
        shards = [[layer.weight for layer in w.model.layers] for w in self.workers]
        return [torch.cat(parts, 1) for parts in zip(*shards, strict=True)]

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.log.append(method.removeprefix("patcher_"))
        if method in self.hangs:
            await asyncio.Event().wait()
        plain = getattr(worker, method)
        return [self.fail.get((method, w.rank), plain)(w, *args) for w in self.workers]

    async def is_paused(self) -> bool:
        return self.stopped

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.log.append(f"pause {mode}")
        self.stopped = True
        if mode == "wait" and not self.drains:
            await asyncio.Event().wait()

    async def resume_generation(self) -> None:
        self.log.append("resume")
        self.stopped = False
        self.resumed.append([w.clone() for w in self.live()])

    async def reset_prefix_cache(self, **_: bool) -> bool:
        answer = self.flushes.pop(0) if self.flushes else True
        self.log.append("flush")
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def reset_mm_cache(self) -> None:
        pass

    async def reset_encoder_cache(self) -> None:
        pass

    async def update_weight_version(self, version: str) -> None:
        self.version = version

    async def get_weight_version(self) -> str:
        return self.version
