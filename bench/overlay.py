"""Tokens per second of a quantised model: as it is, with room for patches, patched, with a LoRA.

The real model's linear layers are rounded to four bits in groups of 32. Four engines, each in a
process of its own, one after another: without patcher; with overlays of the given rank, empty
and then with a patch of that rank on every layer; with vLLM's LoRA path, whose adapter is the same
delta (``B = L``, ``A = R W``). Median of some rounds, with the least and the most.

    python bench/overlay.py [--rank 64] [--batch 1 8] [--compiled] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from load import MODEL, REPOSITORY, layer_count, random_patch
from peers import write_adapter
from quantise import quantise
from report import Plot, Spread, at_least, document, finish, line, options

PARTS = ("without patcher", "overlaid", "LoRA")


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="vLLM's default; starts slower")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.rounds = 48, 3
    if args.part:
        print("found: " + json.dumps(measure(args)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        prepare(args.model, Path(folder), args.rank)
        found: dict[str, Any] = {}
        for part in PARTS:
            found |= in_process(part, Path(folder))
    return report(found, args)


def prepare(model: Path, folder: Path, rank: int) -> None:
    """The quantised checkpoint, a random patch on it, and the adapter that is the same delta."""
    quantise(model, folder / "quantised", folder / "plain")
    plain = folder / "plain"
    draw = np.random.default_rng(0)
    patch = random_patch(plain, range(layer_count(plain)), draw, rank=rank, scale=0.1)
    patch.write(folder / "patch.st")
    write_adapter(patch, plain, folder / "adapter", rank)


def in_process(part: str, folder: Path) -> dict[str, Any]:
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if part == "overlaid":
        settings["VLLM_PLUGINS"] = "patcher"
    # A cache of its own: vLLM's key for compiled code doesn't know of the overlay.
    settings["VLLM_CACHE_ROOT"] = str(folder / "compiled" / part.replace(" ", "-"))
    words = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **settings}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("found: ")]
    if done.returncode or not said:
        raise SystemExit(f"{part}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(said[-1].removeprefix("found: "))
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    os.environ["PATCHER_OVERLAY_RANK"] = str(args.rank)
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    lora = {"enable_lora": True, "max_lora_rank": args.rank} if args.part == "LoRA" else {}
    llm = LLM(
        str(args.folder / "quantised"),
        enforce_eager=not args.compiled,
        max_model_len=1024,
        **lora,
    )
    if args.part == "LoRA":
        adapter = LoRARequest("same", 1, str(args.folder / "adapter"))
        return {"LoRA enabled": rates(llm, args), "LoRA": rates(llm, args, adapter)}
    found = {"overlaid, empty" if args.part == "overlaid" else args.part: rates(llm, args)}
    if args.part == "overlaid":
        import patcher

        with patcher.attach(llm) as engine:
            engine.apply(args.folder / "patch.st")
            found["overlaid, patched"] = rates(llm, args)
    return found


def rates(llm: Any, args: argparse.Namespace, adapter: Any = None) -> dict[str, list[float]]:
    """Tokens per second of each round, by batch size."""
    from vllm import SamplingParams

    found: dict[str, list[float]] = {}
    for batch in args.batch:
        prompts = [{"prompt_token_ids": [*range(100 + n, 132 + n)]} for n in range(batch)]
        ask = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
        found[str(batch)] = []
        for number in range(args.rounds + 1):
            began = time.perf_counter()
            llm.generate(prompts, ask, use_tqdm=False, lora_request=adapter)
            if number:  # the first one warms up
                rate = batch * args.tokens / (time.perf_counter() - began)
                found[str(batch)].append(rate)
    return found


def report(found: dict[str, Any], args: argparse.Namespace) -> int:
    rows, checks = [], []
    drawn: dict[str, dict[int, Spread]] = {part: {} for part in found}
    for batch in args.batch:
        plain = statistics.median(found["without patcher"][str(batch)])
        for part, of in found.items():
            ratio = Spread.of(rate / plain for rate in of[str(batch)])
            drawn[part][batch] = ratio
            rows.append(
                {
                    "batch": batch,
                    "part": part,
                    "tokens/s": statistics.median(of[str(batch)]),
                    "ratio": ratio.median,
                    "least": ratio.low,
                    "most": ratio.high,
                }
            )
        value = drawn["overlaid, patched"][batch].median / drawn["LoRA"][batch].median
        checks.append(at_least(f"overlay against vLLM's LoRA path, batch {batch}", value, 1.0))
    lines = [line(part, points) for part, points in drawn.items() if part != "without patcher"]
    plot = Plot("batch", "tokens/s against the model without patcher", lines, 1.0)
    question = "What does an overlay cost, where a quantised weight can't be folded?"
    notes = [
        f"rank {args.rank} on every layer, {'compiled' if args.compiled else 'eager'}; engines run"
        " one after another, so these ratios are rougher than those within an engine"
    ]
    return finish(document(question, rows, checks, args, plot=plot, notes=notes), args)


if __name__ == "__main__":
    sys.exit(main())
