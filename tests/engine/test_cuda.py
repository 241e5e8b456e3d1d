"""What only a GPU can show: folds computed there, and copies on a stream of their own."""

from __future__ import annotations

import pytest
import torch

from patcher.engine.sites import TensorStaged
from patcher.engine.streams import side_stream
from patcher.kernels import LowRank, checksum, digest, fold

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
GPU = torch.device("cuda")


def weight() -> torch.Tensor:
    return torch.randn(256, 3000, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("count", [1, 12])  # of rank 16: beyond 156 held dense
def test_a_fold_on_the_gpu_is_the_one_on_the_host(count: int) -> None:
    draw = torch.Generator().manual_seed(1)
    deltas = [
        LowRank(
            "multiplicative",
            torch.randn(256, 16, generator=draw),
            torch.randn(16, 256, generator=draw) / 256,
        )
        for _ in range(count)
    ]
    base = weight()
    want = fold(base, deltas)
    assert torch.equal(fold(base, deltas, device=GPU), want)
    assert torch.equal(fold(base.to(GPU), deltas).cpu(), want)
    assert digest(want.to(GPU)) == digest(want)
    assert checksum(want.to(GPU)) == checksum(want)


def test_work_on_the_side_is_done_when_it_is_left_and_waits_for_what_came_before() -> None:
    live = weight().to(GPU)
    busy = torch.randn(4096, 4096, device=GPU)
    for _ in range(50):
        busy = busy @ busy / 64
    live.add_(busy[0, 0] * 0)  # queued behind all of that
    with side_stream(GPU):
        live.fill_(3.0)
    assert torch.equal(live.cpu(), torch.full_like(live, 3.0, device="cpu"))


def test_a_live_tensor_is_written_and_put_back_to_the_bit() -> None:
    live, before = weight().to(GPU), weight()
    staged = TensorStaged(live, before * 2)
    staged.commit()
    assert torch.equal(live.cpu(), before * 2)
    staged.undo()
    assert torch.equal(live.cpu(), before)
