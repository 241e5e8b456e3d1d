from __future__ import annotations

import hashlib
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patcher.kernels import checksum, column_blocks, column_digests, digest


def test_is_the_sha256_of_the_row_major_bytes() -> None:
    t = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.bfloat16)
    assert digest(t) == hashlib.sha256(bytes.fromhex("803f00c0003f0000")).hexdigest()
    assert digest(t.float()) == hashlib.sha256(t.float().numpy().tobytes()).hexdigest()


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_strides_make_no_difference(rows: int, columns: int, dtype: torch.dtype) -> None:
    t = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert digest(t.t().contiguous().t()) == digest(t)
    assert digest(torch.cat([t, t], 1)[:, columns:]) == digest(t)
    assert digest(torch.nn.Parameter(t)) == digest(t)


def test_every_bit_counts() -> None:
    t = torch.full((3, 4), 1.5, dtype=torch.float16)
    seen = {digest(t)}
    for bit in range(t.numel() * 16):
        flipped = t.clone().view(torch.int16)
        flipped.view(-1)[bit // 16] ^= -(2**15) if bit % 16 == 15 else 1 << bit % 16
        seen.add(digest(flipped.view(torch.float16)))
    assert len(seen) == 1 + 3 * 4 * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_a_packed_weight_cannot_be_read_back_with_does_not_count(dtype: torch.dtype) -> None:
    plain = torch.tensor([[0.0, 1.0, -1.0]], dtype=dtype)
    assert digest(torch.tensor([[-0.0, 1.0, -1.0]], dtype=dtype)) == digest(plain)
    subnormal = plain.clone()
    subnormal[0, 0] = torch.finfo(dtype).smallest_normal / 2
    assert (digest(subnormal) == digest(plain)) is (dtype == torch.bfloat16)


def test_large_tensors_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.randn(50, 30, generator=torch.Generator().manual_seed(2)).t()
    want = digest(t)
    monkeypatch.setattr(importlib.import_module("patcher.kernels.digest"), "_CHUNK_BYTES", 100)
    assert digest(t) == want == hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_takes_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    assert digest(t) == hashlib.sha256(t.numpy().tobytes()).hexdigest()


def test_refuses_dtypes_without_plain_bytes() -> None:
    with pytest.raises(ValueError, match="complex"):
        digest(torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize(("d_in", "blocks"), [(1536, 48), (9728, 16), (4864, 16), (7, 1), (50, 2)])
def test_column_blocks_divide_the_weight_and_48(d_in: int, blocks: int) -> None:
    assert column_blocks(d_in) == blocks
    assert d_in % blocks == 48 % blocks == 0


def test_column_digests_name_the_shards() -> None:
    t = torch.randn(4, 96, generator=torch.Generator().manual_seed(4)).bfloat16()
    blocks = column_digests(t, 48)
    assert blocks == [digest(t[:, j : j + 2].contiguous()) for j in range(0, 96, 2)]
    assert column_digests(t[:, 48:], 24) == blocks[24:]


def test_refuses_blocks_that_do_not_divide() -> None:
    t = torch.zeros(2, 6)
    for blocks in (0, 4, 7):
        with pytest.raises(ValueError, match="do not divide"):
            column_digests(t, blocks)
    with pytest.raises(ValueError, match="matrix"):
        column_digests(t[0], 2)
    with pytest.raises(ValueError, match="at least one column"):
        column_blocks(0)


@given(
    shape=st.sampled_from([(1, 1), (3, 5), (16, 16), (7, 129), (40, 96)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int8]),
    data=st.data(),
)
def test_a_checksum_tells_any_bit_and_no_stride(
    shape: tuple[int, int], dtype: torch.dtype, data: st.DataObject
) -> None:
    t = torch.randint(-99, 99, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert checksum(t.t().contiguous().t()) == checksum(t)
    assert checksum(torch.cat([t[:, :1], t], 1)[:, 1:]) == checksum(t)
    assert checksum(torch.cat([t[:1], t])[1:]) == checksum(t)
    flipped = t.clone().view(torch.uint8)
    at = data.draw(st.integers(0, flipped.numel() - 1))
    flipped.view(-1)[at] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(flipped.view(dtype)) != checksum(t)


def test_a_checksum_tells_moved_parts_and_zeros_at_the_end() -> None:
    t = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert checksum(t.flip(0)) != checksum(t)
    zeros = [
        checksum(torch.zeros(n, dtype=torch.bfloat16)) for n in (1, 2, 200, 255, 256, 257, 512)
    ]
    assert len(set(zeros)) == len(zeros)


def test_zeros_among_the_weights_have_no_sign() -> None:
    t = torch.randn(300, 3000, generator=torch.Generator().manual_seed(1)).bfloat16()
    t[200, 7], t[299, 2999] = -0.0, 1e-39
    plain = t.clone()
    plain[200, 7] = plain[299, 2999] = 0.0
    assert digest(t) == digest(plain) == hashlib.sha256(plain.view(torch.int16).numpy()).hexdigest()
