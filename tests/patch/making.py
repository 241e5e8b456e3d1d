"""Small patches, and files that lie about being one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from patcher.patch import Delta, Patch
from tests.golden.make_v1 import manifest, matrix, module

M = "model.layers.0.mlp.down_proj"
N = "model.layers.1.mlp.down_proj"


def small() -> Patch:
    """One multiplicative and one additive module."""
    modules = {M: module((4, 6), "bfloat16", 1), N: module((4, 6), "bfloat16", 2)}
    deltas = {
        M: Delta.multiplicative(matrix(4, 2, 1), matrix(2, 4, 2), "F32"),
        N: Delta.additive(matrix(4, 1, 3), matrix(1, 6, 4), "BF16"),
    }
    return Patch.build(manifest("small", modules), deltas)


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A file's header as JSON, and its tensors' bytes."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def packed(header: Any, body: bytes) -> bytes:
    """A file as the writer would lay it out, whatever the header says."""
    text = header if isinstance(header, bytes) else dumped(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def with_manifest(fields: Any, data: bytes | None = None) -> bytes:
    """The small patch under another manifest, given as text, or as fields made canonical."""
    header, body = parts(small().data if data is None else data)
    text = fields
    if not isinstance(fields, str):
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    header["__metadata__"]["patcher"] = text
    return packed(header, body)


def fields() -> dict[str, Any]:
    """The small patch's manifest, to be changed."""
    result: dict[str, Any] = json.loads(small().manifest.canonical())
    return result


def file_of(
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]], text: str | None = None
) -> bytes:
    """A well-formed safetensors file of those tensors, in the order given."""
    header: dict[str, Any] = {
        "__metadata__": {"patcher": small().manifest.canonical().decode() if text is None else text}
    }
    begin = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [begin, begin + len(data)],
        }
        begin += len(data)
    return packed(header, b"".join(data for _, _, data in tensors.values()))


def honest() -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The small patch's tensors, to be changed."""
    header, body = parts(small().data)
    header.pop("__metadata__")
    return {
        name: (entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()
