"""Modules that a name leads to and that can't be patched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from patcher.engine.vllm_experts import find_experts
from patcher.engine.vllm_worker import find_site
from patcher.errors import EngineRefusedError


def test_one_expert_alone_is_refused_with_the_name_of_all() -> None:
    mixture = torch.nn.Module()
    mixture.mlp = torch.nn.Module()
    mixture.mlp.experts = torch.nn.Module()  # one fused module, as vLLM has it
    dense = torch.nn.Module()
    dense.mlp = torch.nn.Module()
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([mixture, dense])
    with pytest.raises(EngineRefusedError, match="fused") as caught:
        find_site(model, "layers.0.mlp.experts.3.down_proj")
    assert "layers.0.mlp.experts.down_proj" in caught.value.cure
    assert find_site(model, "layers.1.mlp.experts.3.down_proj") is None
    assert find_site(model, "layers.1.mlp.experts.down_proj") is None


def played_experts(**of: Any) -> SimpleNamespace:
    """vLLM's ``MoERunner`` on a GPU, as far as it is looked at before its weights are."""
    routed = SimpleNamespace(
        moe_config=SimpleNamespace(
            num_logical_experts=4,
            hidden_dim_unpadded=8,
            intermediate_size_per_partition_unpadded=6,
            moe_parallel_config=SimpleNamespace(tp_rank=1, tp_size=2),
        ),
        quant_method=UnquantizedFusedMoEMethod(SimpleNamespace(name="TRITON")),
        local_num_experts=4,
        use_ep=False,
        w2_weight=torch.arange(4.0 * 8 * 8).view(4, 8, 8),  # with two columns of padding
    )
    for key, value in of.items():
        setattr(routed, key, value)
    return SimpleNamespace(routed_experts=routed)


class UnquantizedFusedMoEMethod(SimpleNamespace):
    """Known by its name, as vLLM's is."""

    def __init__(self, backend: SimpleNamespace) -> None:
        super().__init__(unquantized_backend=backend)


@pytest.mark.parametrize(
    ("of", "cause", "cure"),
    [
        ({"quant_method": SimpleNamespace()}, "can't be folded", "unquantised"),
        ({"use_ep": True}, "spread", "--enable-expert-parallel"),
        ({"local_num_experts": 5}, "kept twice", "--enable-expert-parallel"),
        (
            {"quant_method": UnquantizedFusedMoEMethod(SimpleNamespace(name="AITER"))},
            "shuffles",
            "--moe-backend triton",
        ),
    ],
)
def test_experts_that_cannot_be_folded_are_refused(
    of: dict[str, Any], cause: str, cure: str
) -> None:
    with pytest.raises(EngineRefusedError, match=cause) as caught:
        find_experts("layers.0.mlp.experts.down_proj", played_experts(**of))
    assert cure in caught.value.cure


def test_plain_experts_are_one_matrix_whose_padding_is_left_alone() -> None:
    runner = played_experts()
    live = runner.routed_experts.w2_weight
    before = live.clone()
    site = find_experts("layers.0.mlp.experts.down_proj", runner)
    assert site.columns == (24, 48, 48)
    held = site.read()
    assert torch.equal(held.view(8, 6, 4)[:, :, 3], before[3, :, :6])
    staged = site.stage(held + 1)
    assert torch.equal(live, before)
    staged.commit()
    assert torch.equal(live[:, :, :6], before[:, :, :6] + 1)
    assert torch.equal(live[:, :, 6:], before[:, :, 6:])
    staged.undo()
    assert torch.equal(live, before)
