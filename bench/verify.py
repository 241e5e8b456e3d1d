"""Digests: of the live weights against sha256 alone, and the quick check against one read.

    python bench/verify.py [--quick] [--json] [--device cuda]

``digest`` (SHA-256 of a weight's values, what manifests and the ledger hold) against OpenSSL's
SHA-256 of as many bytes; ``checksum`` (what every change asks each patched module for first)
against one read of them, a sum of 64-bit words. Where vLLM serves from a pack, as on CPUs, the
weight has to be multiplied out of it before either: that is measured on a real pack.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from report import (
    SIZES,
    Plot,
    Spread,
    at_most,
    document,
    finish,
    interleaved,
    line,
    options,
    ratios,
)

from patcher.kernels import checksum, digest

OF_SHA, OF_READ = 1.2, 2.0
WHY = (
    "hashing is bound by the processor; beside it each value is looked at twice for zeros with a"
    " sign and subnormals, which a pack can't be read back with, and a small weight pays for calls"
)


def main() -> int:
    args = options(__doc__).parse_args()
    torch.manual_seed(0)
    sizes = dict(list(SIZES.items())[:2]) if args.quick else SIZES
    rows: list[dict[str, Any]] = []
    checks = []
    hashed, summed = {}, {}
    for name, shape in sizes.items():
        row, of_sha, of_read = measure(name, shape, args.device)
        rows.append(row)
        size = row["MiB"]
        hashed[size], summed[size] = of_sha, of_read
        checks.append(at_most(f"{name}: digest against sha256", of_sha.median, OF_SHA, WHY))
        checks.append(at_most(f"{name}: quick check against a read", of_read.median, OF_READ))
    lines = [line("digest against sha256", hashed), line("checksum against a read", summed)]
    plot = Plot("MiB of the weight", "time against the peer", lines, OF_SHA)
    question = "What does it cost to know which weights serve?"
    notes = ["ms are medians, ratios medians of rounds in turn; memcpy for comparison"]
    return finish(document(question, rows, checks, args, plot=plot, notes=notes), args)


def measure(
    name: str, shape: tuple[int, int], device: str
) -> tuple[dict[str, Any], Spread, Spread]:
    weight = torch.randn(shape).bfloat16()
    weight[:, ::100] = 0  # quantised models have zeros, and those take a second look
    held = weight.to(device)
    words, copy = held.view(torch.int64), torch.empty_like(held)
    raw = weight.view(torch.int16).numpy().data
    settle = torch.cuda.synchronize if device == "cuda" else None
    times = max(1, int(2e7 / weight.nbytes))  # in a round: a small weight takes microseconds
    ways: dict[str, Callable[[], Any]] = {
        "sha256": lambda: hashlib.sha256(raw).digest(),
        "digest": partial(digest, held),
        "read": lambda: int(words.sum()),
        "checksum": partial(checksum, held),
        "memcpy": partial(copy.copy_, held),
    }
    took = interleaved(
        {way: partial(again, times, call) for way, call in ways.items()}, 7, settle=settle
    )
    of_sha, of_read = ratios(took["digest"], took["sha256"]), ratios(took["checksum"], took["read"])
    row = {
        "size": name,
        "MiB": round(weight.nbytes / 2**20, 1),
        **{f"{way} ms": Spread.of(seconds).median / times * 1e3 for way, seconds in took.items()},
        "digest / sha256": of_sha.median,
        "checksum / read": of_read.median,
    }
    pack = packed(weight) if device == "cpu" else None
    if pack:
        row["out of a pack ms"] = pack * 1e3
    return row, of_sha, of_read


def again(times: int, call: Callable[[], Any]) -> None:
    for _ in range(times):
        call()


def packed(weight: torch.Tensor) -> float | None:
    """Seconds to read a weight back out of vLLM's pack; None where that takes minutes."""
    if weight.numel() > 5e7:
        return None
    from vllm import _custom_ops as ops

    from patcher.engine.vllm_worker import _read_pack

    handler = ops.create_onednn_mm(weight.t(), 32)
    took = interleaved({"read": partial(_read_pack, handler, weight.dtype)}, 3)
    return Spread.of(took["read"]).median


if __name__ == "__main__":
    sys.exit(main())
