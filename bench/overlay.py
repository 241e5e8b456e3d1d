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
from quantise import quantise
from safetensors import safe_open
from safetensors.torch import save_file

PARTS = ("without patcher", "overlaid", "LoRA")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="vLLM's default; starts slower")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.rounds = 48, 3
    if options.part:
        print("found: " + json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(options.model, Path(folder), options.rank)
        found: dict[str, Any] = {}
        for part in PARTS:
            found |= in_process(part, Path(folder))
    report(found, options)


def prepare(model: Path, folder: Path, rank: int) -> None:
    """The quantised checkpoint, a random patch on it, and the adapter that is the same delta."""
    quantise(model, folder / "quantised", folder / "plain")
    plain = folder / "plain"
    draw = np.random.default_rng(0)
    patch = random_patch(plain, range(layer_count(plain)), draw, rank=rank, scale=0.1)
    patch.write(folder / "patch.st")
    adapter = {}
    with safe_open(plain / "model.safetensors", "pt") as held:
        for name, delta in patch.deltas.items():
            weight = held.get_tensor(f"{name}.weight")
            left, right = delta.to_torch()[1:]
            prefix = f"base_model.model.{name}"
            adapter[f"{prefix}.lora_A.weight"] = (right @ weight.float()).to(weight.dtype)
            adapter[f"{prefix}.lora_B.weight"] = left.to(weight.dtype)
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["down_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


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


def measure(options: argparse.Namespace) -> dict[str, Any]:
    os.environ["PATCHER_OVERLAY_RANK"] = str(options.rank)
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    lora = {"enable_lora": True, "max_lora_rank": options.rank} if options.part == "LoRA" else {}
    llm = LLM(
        str(options.folder / "quantised"),
        enforce_eager=not options.compiled,
        max_model_len=1024,
        **lora,
    )
    if options.part == "LoRA":
        adapter = LoRARequest("same", 1, str(options.folder / "adapter"))
        return {"LoRA enabled": rates(llm, options), "LoRA": rates(llm, options, adapter)}
    found = {"overlaid, empty" if options.part == "overlaid" else options.part: rates(llm, options)}
    if options.part == "overlaid":
        import patcher

        with patcher.attach(llm) as engine:
            engine.apply(options.folder / "patch.st")
            found["overlaid, patched"] = rates(llm, options)
    return found


def rates(llm: Any, options: argparse.Namespace, adapter: Any = None) -> dict[str, list[float]]:
    """Tokens per second of each round, by batch size."""
    from vllm import SamplingParams

    found: dict[str, list[float]] = {}
    for batch in options.batch:
        prompts = [{"prompt_token_ids": [*range(100 + n, 132 + n)]} for n in range(batch)]
        ask = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
        found[str(batch)] = []
        for number in range(options.rounds + 1):
            began = time.perf_counter()
            llm.generate(prompts, ask, use_tqdm=False, lora_request=adapter)
            if number:  # the first one warms up
                rate = batch * options.tokens / (time.perf_counter() - began)
                found[str(batch)].append(rate)
    return found


def report(found: dict[str, Any], options: argparse.Namespace) -> None:
    rows, checks = [], []
    for batch in map(str, options.batch):
        plain = statistics.median(found["without patcher"][batch])
        ratio = {part: statistics.median(of[batch]) / plain for part, of in found.items()}
        for part, of in found.items():
            low, high = min(of[batch]) / plain, max(of[batch]) / plain
            rows.append((batch, part, statistics.median(of[batch]), ratio[part], low, high))
        value = ratio["overlaid, patched"] / ratio["LoRA"]
        checks.append({"name": f"overlay against LoRA, batch {batch}", "value": value, "bar": 1.0})
    for check in checks:
        check["ok"] = check["value"] >= check["bar"]
    if options.json:
        print(json.dumps({"rates": found, "rank": options.rank, "checks": checks}, indent=1))
        return
    print(f"rank {options.rank}, {'compiled' if options.compiled else 'eager'}")
    print(f"{'batch':>5}  {'part':<18} {'tokens/s':>9} {'ratio':>6}  least to most")
    for batch, part, rate, one, low, high in rows:
        print(f"{batch:>5}  {part:<18} {rate:>9.1f} {one:>6.2f}  {low:.2f} to {high:.2f}")
    for check in checks:
        holds = "holds" if check["ok"] else "FAILS"
        print(f"{holds}  {check['name']}: {check['value']:.2f} (at least {check['bar']})")


if __name__ == "__main__":
    main()
