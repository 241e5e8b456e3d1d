"""Writes tests/golden/v1: files of format 1 that every later version must read.

Every value is a small fraction, made without a random generator, so that each run
gives the same bytes anywhere. Run it from the repository's root, only to add files:

    python -m tests.golden.make_v1
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from patcher.patch import Base, Delta, Manifest, Method, Patch, Requests

FOLDER = Path(__file__).parent / "v1"
Matrix = npt.NDArray[np.float32]


def matrix(rows: int, columns: int, seed: int) -> Matrix:
    """Multiples of 1/8 between -2 and 2, exact in every dtype that a patch stores."""
    cells = (np.arange(rows * columns) * 7 + seed * 5) % 33 - 16
    return (cells / 8).astype(np.float32).reshape(rows, columns)


def module(shape: tuple[int, int], dtype: str, seed: int) -> dict[str, Any]:
    """What a manifest says of a weight; its digests are stand-ins, not of real weights."""

    def stand_in(number: int) -> str:
        return hashlib.sha256(f"golden {seed} {number}".encode()).hexdigest()

    blocks = [stand_in(j) for j in range(1, 1 + math.gcd(shape[1], 48))]
    return {"shape": list(shape), "dtype": dtype, "digest": stand_in(0), "blocks": blocks}


def manifest(title: str, modules: dict[str, Any], **more: Any) -> Manifest:
    return Manifest.model_validate(
        {
            "title": title,
            "created": "2026-01-31T12:00:00Z",
            "tool": "patcher golden",
            "base": Base.model_validate(
                {"model": "example/tiny", "architecture": "LlamaForCausalLM", "modules": modules}
            ),
            "method": Method(name="zero", hyperparameters={"layers": [0, 1], "ridge": 0.5}),
            "requests": Requests(count=2, commitment="ab" * 32),
            **more,
        }
    )


def multiplicative() -> Patch:
    name = "model.layers.0.mlp.down_proj"
    delta = Delta.multiplicative(matrix(4, 2, 1), matrix(2, 4, 2), "F32")
    return Patch.build(
        manifest("multiplicative", {name: module((4, 6), "bfloat16", 1)}), {name: delta}
    )


def additive() -> Patch:
    name = "model.layers.1.mlp.down_proj"
    delta = Delta.additive(matrix(4, 3, 3), matrix(3, 6, 4), "BF16")
    return Patch.build(manifest("additive", {name: module((4, 6), "float16", 2)}), {name: delta})


def both() -> Patch:
    """Every kind, dtype and field with something in it, and a title beyond ASCII."""
    deltas = {
        "transformer.h.10.mlp.c_proj": Delta.multiplicative(
            matrix(3, 1, 5), matrix(1, 3, 6), "F16"
        ),
        "transformer.h.2.mlp.c_proj": Delta.additive(matrix(3, 2, 7), matrix(2, 5, 8), "BF16"),
        "transformer.h.9.mlp.c_proj": Delta.multiplicative(matrix(3, 3, 9), matrix(3, 3, 1), "F32"),
    }
    modules = {name: module((3, 5), "float32", place) for place, name in enumerate(deltas)}
    filled = manifest(
        "Löschung – 忘却",
        modules,
        requires=["01" * 32],
        conflicts=["02" * 32, "03" * 32],
        evaluation={"on": "2 facts", "efficacy": 0.05, "perplexity": 1.0003, "kept": [136, 150]},
    )
    return Patch.build(filled, deltas)


def unknown_fields() -> Patch:
    """What a later writer may add; nothing critical."""
    name = "model.layers.0.mlp.down_proj"
    delta = Delta.multiplicative(matrix(4, 1, 2), matrix(1, 4, 3), "F16")
    known = {**module((4, 48), "bfloat16", 3), "note": None}
    more = {"later": {"nested": [1, 2.5, "x", True, None]}, "critical": ["title"]}
    return Patch.build(manifest("from a later writer", {name: known}, **more), {name: delta})


def patches() -> dict[str, Patch]:
    made: Iterable[Any] = (multiplicative, additive, both, unknown_fields)
    return {make.__name__.replace("_", "-"): make() for make in made}


def expectations(patch: Patch) -> dict[str, Any]:
    """What any reader must find in the file."""
    return {
        "id": patch.id,
        "bytes": len(patch.data),
        "manifest": json.loads(patch.manifest.canonical()),
        "deltas": {
            name: {
                "kind": delta.kind,
                "dtype": delta.dtype,
                "left": delta.left.tolist(),
                "right": delta.right.tolist(),
            }
            for name, delta in patch.deltas.items()
        },
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, patch in patches().items():
        patch.write(FOLDER / f"{name}.safetensors")
    expected = {name: expectations(patch) for name, patch in patches().items()}
    text = json.dumps(expected, indent=1, ensure_ascii=False, sort_keys=True)
    (FOLDER / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
