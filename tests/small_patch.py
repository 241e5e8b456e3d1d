"""Small patches of no real model, and the ways in which a file can be damaged."""

from __future__ import annotations

import json
import struct

import numpy as np

from patcher.patch import Base, Delta, Manifest, Method, ModuleBase, Patch, Requests

MODULE = "model.layers.0.mlp.down_proj"


def small_patch(seed: int = 0, title: str = "a small edit") -> Patch:
    draw = np.random.default_rng(seed)
    left, right = draw.normal(size=(8, 2)), draw.normal(size=(2, 8))
    weight = ModuleBase(shape=(8, 12), dtype="float32", digest="0" * 64, blocks=("0" * 64,) * 12)
    manifest = Manifest(
        title=title,
        created="2026-11-24T00:00:00Z",
        tool="tests",
        base=Base(model="test", architecture="LlamaForCausalLM", modules={MODULE: weight}),
        method=Method(name="random", hyperparameters={"seed": seed}),
        requests=Requests(count=1, commitment="0" * 64),
    )
    delta = Delta.multiplicative(left.astype(np.float32), right.astype(np.float32))
    return Patch.build(manifest, {MODULE: delta})


def truncated(data: bytes) -> bytes:
    return data[:-7]


def with_nan(data: bytes) -> bytes:
    return data[:-4] + struct.pack("<f", float("nan"))


def of_format_2(data: bytes) -> bytes:
    written = json.dumps('"format":1')[1:-1].encode()
    assert data.count(written) == 1
    return data.replace(written, written.replace(b"1", b"2"))


def not_a_patch(data: bytes) -> bytes:
    return b"PK\x03\x04 something else entirely"


DAMAGES = {
    "truncated": (truncated, "invalid-patch"),
    "nan-inside": (with_nan, "invalid-patch"),
    "other-format": (of_format_2, "format-version"),
    "not-a-patch": (not_a_patch, "invalid-patch"),
    "empty": (lambda data: b"", "invalid-patch"),
}
