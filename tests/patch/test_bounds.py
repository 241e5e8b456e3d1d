"""Files made to exhaust or to overflow: refused within bounds of size, time and memory."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from patcher.errors import InvalidPatchError
from patcher.kernels import fold
from patcher.patch import Delta, Patch, bounds, canonical, container
from tests.golden.make_v1 import FOLDER, manifest, module

from . import making
from .making import M, N, fields, file_of, floats, honest, packed, with_manifest

Array = npt.NDArray[Any]
ALLOWED = 128 << 20  # bytes of memory that small values may take, however short their text
V = canonical.MAX_VALUES - 2000


def refused(data: bytes, words: str = ".") -> InvalidPatchError:
    with pytest.raises(InvalidPatchError, match=words) as caught:
        Patch.from_bytes(data)
    assert caught.value.cure
    return caught.value


# -- norms ---------------------------------------------------------------------------------------


def one(delta: Delta, d_in: int = 48) -> Patch:
    """A patch of one module."""
    shape = (delta.left.shape[0], d_in if delta.kind == "multiplicative" else delta.right.shape[1])
    return Patch.build(manifest("one", {M: module(shape, "bfloat16", 1)}), {M: delta})


def along(size: float, d: int = 4) -> tuple[Array, Array]:
    """Factors of ``size`` times a projection on one direction."""
    direction = np.zeros((d, 1))
    direction[0] = 1
    return direction * size, direction.T


def test_the_bounds_admit_the_golden_files_with_room() -> None:
    for path in FOLDER.glob("*.safetensors"):
        for delta in Patch.read(path).deltas.values():
            assert (delta.gain or 0) < bounds.MAX_GAIN / 100
            assert delta.spectral_norm < bounds.MAX_SPECTRAL_NORM / 100


def test_blows_a_weight_up_by_a_multiplicative_delta() -> None:
    one(Delta.multiplicative(*along(bounds.MAX_GAIN - 1)))
    one(Delta.multiplicative(*along(-bounds.MAX_GAIN - 1)))
    with pytest.raises(InvalidPatchError, match=rf"{M} has a gain of 1025, where 1024 is") as error:
        one(Delta.multiplicative(*along(bounds.MAX_GAIN)))
    assert "lower strength" in error.value.cure


def test_blows_a_weight_up_by_an_additive_delta() -> None:
    one(Delta.additive(*along(bounds.MAX_SPECTRAL_NORM)))
    with pytest.raises(InvalidPatchError, match=rf"{M} has a spectral norm of 6.56e\+04"):
        one(Delta.additive(*along(bounds.MAX_SPECTRAL_NORM + 64)))


@pytest.mark.parametrize("value", [3.4e38, -3.4e38, 1e38, 1e20])
@pytest.mark.parametrize("both", [True, False])
def test_sends_values_whose_products_overflow(value: float, both: bool) -> None:
    for left, right in ((f"{M}.L", f"{M}.R"), (f"{N}.A", f"{N}.B")):
        tensors = honest()
        for name in (left, right) if both else (left,):
            dtype, shape, data = tensors[name]
            huge = floats(*[value] * (len(data) // container.ITEM_BYTES[dtype]))
            bits = np.frombuffer(huge, "<u2")[1::2].tobytes() if dtype == "BF16" else huge
            tensors[name] = (dtype, shape, bits)
        error = refused(file_of(tensors), "blow the weight up")
        assert "nan" not in error.message
        assert "inf" not in error.message


@pytest.mark.parametrize("rank", [33, 200])
@pytest.mark.parametrize("kind", ["multiplicative", "additive"])
def test_hides_a_huge_direction_among_many(kind: str, rank: int) -> None:
    draw = np.random.default_rng(rank)
    q, _ = np.linalg.qr(draw.standard_normal((256, rank)))
    p, _ = np.linalg.qr(draw.standard_normal((256, rank)))
    most = bounds.MAX_GAIN if kind == "multiplicative" else bounds.MAX_SPECTRAL_NORM
    sizes = np.full(rank, most / 4)
    make = Delta.multiplicative if kind == "multiplicative" else Delta.additive
    assert one(make(q * sizes, p.T)).deltas[M].rank == rank
    sizes[rank // 2] = 1.2 * most
    with pytest.raises(InvalidPatchError, match=M):
        one(make(q * sizes, p.T))


def test_hides_a_huge_direction_behind_scaled_factors() -> None:
    left, right = along(bounds.MAX_GAIN * 4)
    for scale in (2.0**-60, 2.0**60):
        with pytest.raises(InvalidPatchError, match="a gain of 4097"):
            one(Delta.multiplicative(left * scale, right / scale))


def test_factors_out_of_scale_are_no_attack() -> None:
    # `compute --as-published` writes such: large factors whose product is small.
    left = np.array([[1000.0, 1000.0], [0.0, 0.0], [0.0, 0.001]])
    right = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]) * 1000
    assert one(Delta.multiplicative(left, right)).deltas[M].gain == pytest.approx(1.618, abs=1e-3)


def test_one_file_is_answered_in_one_way() -> None:
    draw = np.random.default_rng(5)
    q, _ = np.linalg.qr(draw.standard_normal((128, 64)))
    with pytest.raises(InvalidPatchError) as first:
        one(Delta.multiplicative(q * 1100, q.T))
    with pytest.raises(InvalidPatchError) as again:
        one(Delta.multiplicative(q * 1100, q.T))
    assert first.value.message == again.value.message


def test_norms_of_high_ranks_are_shown_from_below_and_close() -> None:
    draw = np.random.default_rng(6)
    left, right = draw.standard_normal((600, 520)), draw.standard_normal((520, 600)) / 600
    delta = Delta.multiplicative(left, right)
    dense = delta.left.astype(float) @ delta.right.astype(float)
    for shown, true in [
        (delta.spectral_norm, np.linalg.norm(dense, 2)),
        (delta.gain, np.linalg.norm(np.eye(600) + dense, 2)),
    ]:
        assert shown is not None
        assert 0.98 * true <= shown <= true * (1 + 1e-9)


def test_slows_the_fold_by_subnormal_values() -> None:
    """They are normal numbers in float64, which everything is computed in."""
    weight = torch.ones(512, 512, dtype=torch.bfloat16)

    def seconds(size: float) -> float:
        delta = one(Delta.multiplicative(np.full((512, 64), size), np.full((64, 512), size)), 512)
        began = time.perf_counter()
        Patch.from_bytes(delta.data)
        fold(weight, [delta.deltas[M].to_torch()] * 4)
        return time.perf_counter() - began

    normal = min(seconds(1e-3) for _ in range(3))
    assert min(seconds(1e-45) for _ in range(3)) < 5 * normal + 0.05


# -- JSON ----------------------------------------------------------------------------------------


def evaluation(value: Any) -> Callable[[], bytes]:
    return lambda: with_manifest(fields() | {"evaluation": {"x": value}})


def blocks(value: Any) -> bytes:
    changed = fields()
    changed["base"]["modules"][M]["blocks"] = value
    return with_manifest(changed)


def modules(value: Any, number: int) -> bytes:
    changed = fields()
    changed["base"]["modules"] = {f"m{place}": value for place in range(number)}
    return with_manifest(changed)


def empty_tensors() -> bytes:
    entry = {"dtype": "F32", "shape": [0, 1], "data_offsets": [0, 0]}
    text = making.small().manifest.canonical().decode()
    return packed(
        {"__metadata__": {"patcher": text}, **{f"t{n}": entry for n in range(V // 8)}}, b""
    )


LONG = 2 << 20
BOMBS: dict[str, Callable[[], bytes]] = {
    # Beyond the bound on values.
    "arrays": lambda: packed(b"[" + b"[]," * LONG + b"1]", b""),
    "objects": lambda: packed(b"[" + b'{"a":{}},' * (LONG // 3) + b"1]", b""),
    "brackets": lambda: packed(b"[" * LONG, b""),
    "quotes": lambda: packed(b'""' * LONG, b""),
    "commas": lambda: packed(b'"",,' * LONG, b""),
    "names": lambda: packed({f"{n:x}": 1 for n in range(LONG // 4)}, b""),
    "ids": lambda: with_manifest(fields() | {"requires": ["a"] * (LONG // 4)}),
    "backslashes": lambda: packed(b'"' + b"\\" * LONG, b""),
    # Within it, and so parsed.
    "objects within": evaluation([{"a": {}} for _ in range(V // 3)]),
    "names within": evaluation({f"{n:x}": 1 for n in range(V)}),
    "texts within": evaluation(["ab"] * V),
    "blocks within": lambda: blocks(["a"] * V),
    "modules within": lambda: modules(1, V),
    "blocks of many modules": lambda: modules({"shape": [4, 48], "blocks": ["a"] * 48}, 4096),
    "empty tensors": empty_tensors,
    # Long texts; a wide character makes each of a string four bytes wide.
    "a wide text": evaluation("a" * (3 * LONG) + "\U0001f600"),
    "quotes in a text": evaluation('"' * LONG),
    "a long name": lambda: packed(b'{"' + "é".encode() * LONG + b'":1}', b""),
    "a long title": lambda: with_manifest(fields() | {"title": "\n" * LONG}),
    "escapes": lambda: packed(b'{"__metadata__":{"patcher":"' + b"\\u0041" * LONG + b'"}}', b""),
}


@pytest.mark.parametrize("name", BOMBS)
def test_sends_a_bomb_of_json(name: str) -> None:
    data = BOMBS[name]()
    began = time.process_time()
    read(data)
    assert time.process_time() - began < 10  # a second or two; minutes where it isn't linear
    tracemalloc.start()
    try:
        read(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < max(10.5 * len(data), ALLOWED)


def read(data: bytes) -> None:
    with contextlib.suppress(InvalidPatchError):
        assert Patch.from_bytes(data).data == data


LONG_NUMBERS = ["1" * 25, "-" + "1" * 24, "0." + "1" * 31, "1" + "0" * 30 + "e1", "1e" + "0" * 40]
LONG_NUMBERS += ["1" * LONG, "0." + "1" * LONG, "1e" + "1" * LONG, "9007199254740993." + "0" * LONG]


@pytest.mark.parametrize("number", LONG_NUMBERS, ids=lambda text: text[:8])
def test_sends_a_long_number(number: str) -> None:
    text = making.small().manifest.canonical().decode()
    began = time.process_time()
    refused(with_manifest(text.replace("0.5", number)), "too many digits")
    refused(packed(f'{{"a":{number}}}'.encode(), b""), "too many digits")
    assert time.process_time() - began < 5


def test_a_file_with_all_modules_that_are_allowed_is_no_attack() -> None:
    entry = module((1, 48), "bfloat16", 1)
    names = [f"m{place:04}" for place in range(4096)]
    delta = Delta.multiplicative([[0.5]], [[0.5]])
    patch = Patch.build(manifest("all", dict.fromkeys(names, entry)), dict.fromkeys(names, delta))
    assert len(patch.deltas) == 4096  # building reads
