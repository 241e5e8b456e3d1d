from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from patcher.errors import InvalidPatchError, UsageError
from patcher.kernels import LowRank
from patcher.patch import Delta, Manifest, Patch, timestamp, tool
from tests.golden.make_v1 import manifest, matrix, module
from tests.kernels.oracle import rounded

from . import making
from .making import M, N

STORED: st.SearchStrategy[Literal["F32", "BF16", "F16"]] = st.sampled_from(["F32", "BF16", "F16"])


@st.composite
def patches(draw: st.DrawFn) -> Patch:
    modules, deltas = {}, {}
    word = r"[A-Za-z0-9_]{1,6}"
    name_of_module = st.from_regex(rf"{word}(\.{word}){{0,3}}", fullmatch=True)
    names = draw(st.lists(name_of_module, min_size=1, max_size=4, unique=True))
    for name in names:
        shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 7)))
        dtype = draw(STORED)
        rank = draw(st.integers(1, min(shape)))
        wide = st.floats(-60000, 60000, width=16)
        narrow = st.floats(-(2**-11), 2**-11, width=16)  # so that no product breaks the bound
        make, width = draw(
            st.sampled_from([(Delta.multiplicative, shape[0]), (Delta.additive, shape[1])])
        )
        left = draw(st.lists(wide, min_size=shape[0] * rank, max_size=shape[0] * rank))
        right = draw(st.lists(narrow, min_size=width * rank, max_size=width * rank))
        modules[name] = module(shape, draw(st.sampled_from(["bfloat16", "float16", "float32"])), 1)
        deltas[name] = make(
            np.array(left).reshape(shape[0], rank), np.array(right).reshape(rank, width), dtype
        )
    title = draw(st.text(max_size=20).filter(str.isprintable))
    values = st.recursive(
        st.none() | st.booleans() | st.text(max_size=9)
        | st.integers(-(2**53) + 1, 2**53 - 1)
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=8,
    )  # fmt: skip
    more = draw(st.dictionaries(st.text(max_size=5), values, max_size=3))
    return Patch.build(manifest(title, modules, evaluation=more), deltas)


@given(patches())
def test_comes_back_from_its_bytes(patch: Patch) -> None:
    again = Patch.from_bytes(patch.data)
    assert again == patch
    assert again.manifest == patch.manifest
    assert again.id == hashlib.sha256(patch.data).hexdigest()
    assert Patch.build(again.manifest, again.deltas).data == patch.data
    for name, delta in patch.deltas.items():
        read = again.deltas[name]
        assert (read.kind, read.dtype) == (delta.kind, delta.dtype)
        np.testing.assert_array_equal(read.left, delta.left)
        np.testing.assert_array_equal(read.right, delta.right)


@given(patches())
def test_is_what_safetensors_writes_and_reads(patch: Patch) -> None:
    tensors = safetensors.torch.load(patch.data)
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    for name, delta in patch.deltas.items():
        suffixes = "LR" if delta.kind == "multiplicative" else "AB"
        for suffix, part in zip(suffixes, (delta.left, delta.right), strict=True):
            tensor = tensors.pop(f"{name}.{suffix}")
            assert tensor.dtype == kinds[delta.dtype]
            np.testing.assert_array_equal(tensor.float().numpy(), part)
    assert not tensors
    text = patch.manifest.canonical().decode()
    assert (
        safetensors.torch.save(safetensors.torch.load(patch.data), {"patcher": text}) == patch.data
    )


def test_opens_as_a_safetensors_file(tmp_path: Any) -> None:
    making.small().write(tmp_path / "p.st")
    with safetensors.safe_open(tmp_path / "p.st", "np") as file:
        assert json.loads(file.metadata()["patcher"])["title"] == "small"
        assert sorted(file.keys()) == [f"{M}.L", f"{M}.R", f"{N}.A", f"{N}.B"]


def test_same_content_same_bytes_whatever_the_order() -> None:
    patch = making.small()
    fields = json.loads(patch.manifest.canonical())
    turned = Manifest.model_validate(dict(reversed(fields.items())))
    assert Patch.build(turned, dict(reversed(list(patch.deltas.items())))).data == patch.data


def test_another_process_makes_the_same_bytes() -> None:
    code = "from tests.patch.making import small; print(small().id)"
    for seed in ("0", "1"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        )
        assert out.stdout.decode().strip() == making.small().id


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys; from patcher.patch import Patch;"
        "Patch.read('tests/golden/v1/both.safetensors');"
        "assert not {'torch', 'safetensors', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reads_any_buffer() -> None:
    data = making.small().data
    for buffer in (bytearray(data), memoryview(data), memoryview(b"x" + data)[1:]):
        assert Patch.from_bytes(buffer) == making.small()


def test_a_patch_can_not_be_changed() -> None:
    patch = Patch.from_bytes(making.small().data)
    deltas: Any = patch.deltas
    delta = patch.deltas[M]
    for change in (
        lambda: setattr(patch, "id", "x"),
        lambda: setattr(patch.manifest, "title", "x"),
        lambda: deltas.__setitem__("x", delta),
        lambda: delta.left.__setitem__((0, 0), 1.0),
        lambda: patch.deltas[N].left.__setitem__((0, 0), 1.0),
        lambda: setattr(delta, "kind", "additive"),
    ):
        with pytest.raises((AttributeError, TypeError, ValueError)):
            change()


def test_patches_are_equal_by_id() -> None:
    patch = making.small()
    assert {patch, Patch.from_bytes(patch.data)} == {patch}
    assert patch != "x"
    assert repr(patch) == f"<Patch {patch.id[:12]} 'small': 2 modules>"


def test_deltas_come_sorted_by_module() -> None:
    assert list(making.small().deltas) == [M, N]


def test_to_torch_does_not_share_memory() -> None:
    delta = making.small().deltas[M]
    low_rank = delta.to_torch()
    assert isinstance(low_rank, LowRank)
    assert low_rank.left.dtype == low_rank.right.dtype == torch.float32
    low_rank.left.fill_(9)
    assert delta.left.max() < 9


def test_takes_torch_matrices_and_gradients() -> None:
    left, right = torch.ones(4, 2, dtype=torch.bfloat16), torch.ones(2, 4, requires_grad=True)
    delta = Delta.multiplicative(left.t().contiguous().t(), right)
    assert delta.left.tolist() == [[1, 1]] * 4


def test_rounds_once_to_the_stored_dtype() -> None:
    tie = 1 + 2**-8 + 2**-40  # through float32 this would become 1
    assert Delta.multiplicative([[tie]], [[1.0]], "BF16").left.item() == 1 + 2**-7
    below = 1 + 2**-8 - 2**-40  # and this 1 + 2^-7
    assert Delta.multiplicative([[below]], [[1.0]], "BF16").left.item() == 1
    assert Delta.multiplicative([[below + 2**-7]], [[1.0]], "BF16").left.item() == 1 + 2**-7
    assert Delta.multiplicative([[1 + 2**-11 + 2**-40]], [[1.0]], "F16").left.item() == 1 + 2**-10
    assert Delta.multiplicative([[1 + 2**-24 + 2**-50]], [[1.0]]).left.item() == 1 + 2**-23


@given(st.floats(-(2.0**130), 2.0**130))
def test_rounds_to_bfloat16_as_whole_numbers_do(value: float) -> None:
    want = rounded(Fraction(value), torch.bfloat16)
    if math.isfinite(want):
        assert Delta.multiplicative([[value]], [[1.0]], "BF16").left.item() == want
    else:
        with pytest.raises(InvalidPatchError, match="not finite"):
            Delta.multiplicative([[value]], [[1.0]], "BF16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_refuses_deltas_that_are_not_finite(value: float) -> None:
    with pytest.raises(InvalidPatchError, match="not finite"):
        Delta.additive([[1.0]], [[value]])
    with pytest.raises(InvalidPatchError, match="not finite"):
        Delta.additive([[1.0]], [[70000.0]], "F16")


def test_refuses_deltas_of_wrong_shape_or_dtype() -> None:
    wrong: list[tuple[Any, Any]] = [
        ([[1.0]], [[1.0], [1.0]]),
        ([1.0], [[1.0]]),
        ([[1.0]], [[1.0, 2.0]]),
    ]
    for left, right in wrong:
        with pytest.raises(InvalidPatchError, match="no multiplicative delta"):
            Delta.multiplicative(left, right)
    with pytest.raises(InvalidPatchError, match="F64"):
        Delta.multiplicative([[1.0]], [[1.0]], "F64")  # type: ignore[arg-type]


def test_norms_are_those_of_the_dense_matrix() -> None:
    for rank in (1, 3, 8):
        delta = Delta.multiplicative(matrix(8, rank, 1), matrix(rank, 8, 3))
        dense = delta.left.astype(float) @ delta.right.astype(float)
        assert delta.rank == rank
        assert delta.norm == pytest.approx(np.linalg.norm(dense))
        assert delta.spectral_norm == pytest.approx(np.linalg.norm(dense, 2))
        assert delta.gain == pytest.approx(np.linalg.norm(np.eye(8) + dense, 2))
    additive = Delta.additive(matrix(5, 2, 1), matrix(2, 9, 2))
    dense = additive.left.astype(float) @ additive.right.astype(float)
    assert additive.spectral_norm == pytest.approx(np.linalg.norm(dense, 2))
    assert additive.gain is None
    damping = Delta.multiplicative([[-0.5], [0.0], [0.0]], [[1.0, 0.0, 0.0]])
    assert damping.gain == pytest.approx(1.0)


def test_build_refuses_what_reading_would_refuse() -> None:
    patch = making.small()
    with pytest.raises(InvalidPatchError, match="has no tensors"):
        Patch.build(patch.manifest, {M: patch.deltas[M]})
    with pytest.raises(InvalidPatchError, match="belongs to no module"):
        Patch.build(patch.manifest, {**patch.deltas, "other": patch.deltas[M]})
    with pytest.raises(InvalidPatchError, match="do not fit"):
        Patch.build(
            patch.manifest,
            {**patch.deltas, M: Delta.multiplicative(matrix(3, 1, 1), matrix(1, 3, 1))},
        )


def test_build_refuses_a_manifest_that_json_cannot_hold() -> None:
    for odd in (float("nan"), {1}, {2: 3}, 2**60, "\ud800"):
        with pytest.raises(InvalidPatchError, match="can't be written"):
            Patch.build(
                making.small().manifest.model_copy(update={"later": odd}), making.small().deltas
            )


@pytest.mark.parametrize("odd", [float("inf"), float("nan"), object(), {3: 4}, 2**53])
def test_a_manifest_takes_finite_json_alone(odd: Any) -> None:
    with pytest.raises(ValueError, match="evaluation"):
        manifest("x", {M: module((4, 6), "bfloat16", 1)}, evaluation={"deep": [odd]})


def test_a_manifest_turns_numpy_numbers_into_plain_ones() -> None:
    made = manifest(
        "x", {M: module((4, 6), "bfloat16", 1)}, evaluation={"a": np.float64(0.5), "b": (1,)}
    )
    assert made.canonical().count(b'"evaluation":{"a":0.5,"b":[1]}') == 1


def test_time_follows_source_date_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1769860800")
    assert timestamp() == "2026-01-31T12:00:00Z"
    for odd in ("x", "", "1e3", str(10**30)):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", odd)
        with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
            timestamp()
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert timestamp().endswith("Z")
    assert tool().startswith("patcher")


@pytest.mark.parametrize(
    "number", [1e15, 1e16, 2.0**53, 123456789012345680000.0, 1e21, 1e300, 5e-324, -0.0]
)
def test_large_and_small_figures_come_back(number: float) -> None:
    made = manifest("x", {M: module((4, 6), "bfloat16", 1)}, evaluation={"figure": number})
    patch = Patch.build(made, {M: making.small().deltas[M]})
    assert patch.manifest.evaluation == {"figure": number}
