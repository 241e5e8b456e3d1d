"""vLLM's own ways to serve other weights, over HTTP, for bench/apply.py; read in vLLM 0.32.0.

Its dev mode (``VLLM_SERVER_DEV_MODE=1``) has routes that stop the engine, call the workers and
drop caches. Its weight-transfer engines (NCCL, CUDA IPC) need a GPU, so what it has on a CPU for
other weights in place is ``reload_weights`` from a folder: of a whole checkpoint, or of a few
tensors, which then are all that is loaded and packed anew.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from patcher.patch import Patch


def write_tensors(patch: Patch, model: Path, folder: Path) -> None:
    """The patched tensors alone, as a checkpoint that ``reload_weights`` takes."""
    folder.mkdir()
    tensors = {}
    with safe_open(model / "model.safetensors", "pt") as held:
        for name, delta in patch.deltas.items():
            weight = held.get_tensor(f"{name}.weight")
            left, right = (factor.float() for factor in delta.to_torch()[1:])
            whole = weight.float()
            tensors[f"{name}.weight"] = (whole + left @ (right @ whole)).to(weight.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_adapter(patch: Patch, model: Path, folder: Path, rank: int) -> None:
    """The LoRA that is the same delta: ``B = L``, ``A = R W``, in PEFT's files."""
    folder.mkdir()
    adapter: dict[str, torch.Tensor] = {}
    with safe_open(model / "model.safetensors", "pt") as held:
        for name, delta in patch.deltas.items():
            weight = held.get_tensor(f"{name}.weight")
            left, right = delta.to_torch()[1:]
            prefix = f"base_model.model.{name}"
            adapter[f"{prefix}.lora_A.weight"] = (right @ weight.float()).to(weight.dtype)
            adapter[f"{prefix}.lora_B.weight"] = left.to(weight.dtype)
    save_file(adapter, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


class Vllm:
    """A served engine in dev mode, without patcher's help."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=300)

    def __enter__(self) -> Vllm:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def post(self, path: str, **options: Any) -> Any:
        """The JSON that a route answers. Raises :class:`SystemExit` where it is an error."""
        answer = self._http.post(path, **options)
        if answer.is_error:
            raise SystemExit(f"{path}: {answer.status_code} {answer.text[:500]}")
        kind = answer.headers.get("content-type", "")
        return answer.json() if kind.startswith("application/json") else None

    def first_words(self) -> list[float]:
        """Log-probabilities of a short greedy answer, which tell weights apart."""
        body = {"model": "m", "prompt": "The capital of France is", "max_tokens": 3}
        found = self.post("/v1/completions", json={**body, "temperature": 0, "logprobs": 1})
        numbers: list[float] = found["choices"][0]["logprobs"]["token_logprobs"]
        return numbers

    def reset(self) -> None:
        """Have every running request computed anew, and change nothing."""
        told = self.post("/reset_prefix_cache", params={"reset_running_requests": True})
        if not told["success"]:
            raise SystemExit("vLLM could not drop its prefix cache")

    def put(self, folder: Path) -> dict[str, float]:
        """Stop, load the weights of ``folder`` in place, drop all caches, go on.

        Milliseconds of the whole ``stop``, of the ``flush``, and of the ``load`` itself.
        """
        begun = time.monotonic()
        self.post("/pause", params={"mode": "keep"})
        paused = time.monotonic()
        wish = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self.post("/collective_rpc", json=wish)
        loaded = time.monotonic()
        self.reset()
        self.post("/reset_mm_cache")
        self.post("/reset_encoder_cache")
        flushed = time.monotonic()
        self.post("/resume")
        stop = time.monotonic() - begun
        parts = {"stop": stop, "flush": flushed - loaded, "load": loaded - paused}
        return {name: 1000 * seconds for name, seconds in parts.items()}

    def load_adapter(self, folder: Path) -> None:
        """vLLM's LoRA load while it serves (``VLLM_ALLOW_RUNTIME_LORA_UPDATING``)."""
        self.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": str(folder)})

    def drop_adapter(self) -> None:
        """The way back."""
        self.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
