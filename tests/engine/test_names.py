"""Modules that a name leads to and that can't be patched."""

from __future__ import annotations

import pytest
import torch

from patcher.engine.vllm_worker import find_site
from patcher.errors import EngineRefusedError


@pytest.mark.parametrize("name", ["mlp.experts.3.down_proj", "mlp.experts.down_proj"])
def test_experts_are_refused_with_the_reason(name: str) -> None:
    mixture = torch.nn.Module()
    mixture.mlp = torch.nn.Module()
    mixture.mlp.experts = torch.nn.Module()  # one fused module, as vLLM has it
    dense = torch.nn.Module()
    dense.mlp = torch.nn.Module()
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([mixture, dense])
    with pytest.raises(EngineRefusedError, match="mixture of experts"):
        find_site(model, f"layers.0.{name}")
    assert find_site(model, f"layers.1.{name}") is None
