"""Bytes of a patch: against a LoRA that does the same, and against the tensors themselves.

    python bench/size.py [--facts 10] [--data DIR] [--quick] [--json] [--device cuda]

Two parts. *The real model*: one patch against some facts, computed with the defaults but with
its factors unrounded, then stored as F32, BF16 (the default) and F16, and cut to lower ranks as
`patcher merge --rank` cuts. Each is folded in memory and asked: its own facts, other wordings of
them, other facts that the model knows, perplexity. The LoRA is what `patcher export --peft` writes
of the same patch (F32), and the same tensors in the patch's dtype. *Larger models*: random factors
on one weight each, really written as a patch, with the real one's manifest, and as an adapter:
bytes hang on shapes alone.

Quick leaves most ranks out, and computes in five steps of one round, on given layers. "Tensors":
the weights that the patch changes, in bfloat16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import torch
from load import MODEL, REPOSITORY
from quality_draws import Draw, draw, read, shipped_subjects
from quality_run import GIVEN, Base, questions
from report import (
    SIZES,
    Check,
    Plot,
    Spread,
    at_most,
    document,
    finish,
    line,
    options,
)
from safetensors.torch import load_file, save_file

from patcher.export import to_peft
from patcher.patch import Delta, Manifest, ModuleBase, Patch
from patcher.patch.compare import Statistics
from patcher.patch.delta import Stored
from patcher.patch.merge import merge
from patcher.unlearn import compute, pipeline
from patcher.unlearn.check import mean_nats
from patcher.unlearn.forward import answered, as_edit, folded
from patcher.unlearn.interference import statistics_of
from patcher.unlearn.job import Settings

LORA, TENSORS = 0.6, 0.01  # bars: of the LoRA's bytes, of the tensors' bytes
FACTS = (1, 5, 10, 50)  # in a patch of the larger models; each takes up to two ranks
RANKS_A_FACT = 2
QUICK_LAYERS = "4,5,6,7,8"  # what `auto` finds for the default's facts
DEFAULT: Stored = Settings((0,)).stored
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MODULE = "model.layers.0.mlp.down_proj"


def unrounded(args: argparse.Namespace, drawn: Draw) -> Patch:
    """The patch that the defaults give, its factors as they were before they were rounded."""
    rows = [{name: row[name] for name in GIVEN} for row in drawn.forget]
    fewer: dict[str, Any] = {"steps": 5, "rounds": 1} if args.quick else {}
    layers = QUICK_LAYERS if args.quick else "auto"
    wide = partial(Settings, stored="F32", **fewer)
    with mock.patch.object(pipeline, "Settings", wide):
        return compute(args.model, rows, None, layers=layers, device=args.device).patch


def stored(patch: Patch, dtype: Stored) -> Patch:
    """The same factors, rounded to what ``dtype`` holds."""
    deltas = {
        name: Delta.multiplicative(d.left, d.right, dtype) for name, d in patch.deltas.items()
    }
    return Patch.build(patch.manifest, deltas)


def cut(patch: Patch, rank: int, statistics: Mapping[str, Statistics]) -> tuple[Patch, float]:
    """At most that rank on every module, as `merge --rank` does it, and the largest error.

    Merging takes two patches: the second one here does nothing.
    """
    nothing = {
        name: Delta.multiplicative(np.zeros((len(d.left), 1)), np.ones((1, len(d.left))))
        for name, d in patch.deltas.items()
    }
    empty = Patch.build(patch.manifest.model_copy(update={"title": "nothing"}), nothing)
    merged = merge([patch, empty], rank=rank, statistics=statistics)
    worst = max(float(module["error"]) for module in merged.modules.values())
    # With the manifest of the whole: sizes then differ by the factors alone.
    return Patch.build(patch.manifest, merged.patch.deltas), worst


def asked(base: Base, drawn: Draw, patch: Patch | None) -> dict[str, Any]:
    """What the model still says with the patch folded in."""
    pairs = questions(base, drawn)
    groups = {
        "answered": pairs["answered"],
        "other wordings": pairs["paraphrases"],
        "others kept": pairs["kept_counterfact"] + pairs["kept_world"],
    }
    with folded(base.model, *([as_edit(patch.deltas)] if patch else [])):
        found: dict[str, Any] = {}
        for name, facts in groups.items():
            flat = [pair for fact in facts for pair in fact]
            said = answered(base.model, flat)
            found[name] = f"{sum(said)}/{len(said)}"
        found["perplexity"] = float(np.exp(mean_nats(base.model, base.windows)))
    return found


def tensors(patch: Patch) -> int:
    """Bytes of the weights that it changes, two a value."""
    shapes = [module.shape for module in patch.manifest.base.modules.values()]
    return sum(2 * d_out * d_in for d_out, d_in in shapes)


def manifest_bytes(patch: Patch) -> int:
    """Bytes of the file that are no factors: the header, for the most part the manifest."""
    each = 4 if next(iter(patch.deltas.values())).dtype == "F32" else 2
    return len(patch.data) - sum(each * (d.left.size + d.right.size) for d in patch.deltas.values())


def adapters(patch: Patch, model: str) -> dict[str, int]:
    """Bytes of the adapter of the same delta, by the dtype that its file stores."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "adapter")
        to_peft([patch], place, model)
        weights, other = place / "adapter_model.safetensors", place / "adapter_config.json"
        factors, sizes = load_file(weights), {}
        for dtype in get_args(Stored):
            save_file({k: v.to(DTYPES[dtype]) for k, v in factors.items()}, weights)
            sizes[dtype] = weights.stat().st_size + other.stat().st_size
        return sizes


def real(args: argparse.Namespace) -> tuple[list[dict[str, Any]], Patch, dict[str, int]]:
    """Rows of every way to store the real model's patch; the default's; the LoRAs' bytes."""
    base = Base(args.model, read(args.data), args.characters, args.device)
    drawn = draw(*base.known("all"), args.facts, args.seed, shipped_subjects())
    whole = unrounded(args, drawn)
    rank = max(delta.rank for delta in whole.deltas.values())
    before = asked(base, drawn, None)
    rows = [{"patch": "none", **before, "perplexity": 1.0}]
    ways: dict[str, tuple[Patch, float]] = {
        f"{dtype}, rank {rank}": (stored(whole, dtype), 0.0) for dtype in get_args(Stored)
    }
    default = ways[f"{DEFAULT}, rank {rank}"][0]
    statistics = statistics_of(args.model, [default], device=args.device)
    for part in args.parts:
        lower = max(1, rank // part)
        one, error = cut(whole, lower, statistics)
        ways[f"{DEFAULT}, rank {lower}"] = (stored(one, DEFAULT), error)
    for name, (patch, error) in ways.items():
        found = asked(base, drawn, patch)
        found["perplexity"] = found["perplexity"] / before["perplexity"]
        size = len(patch.data)
        shares = {"bytes": size, "of the tensors": size / tensors(patch), "error": error}
        rows.append({"patch": name, **found, **shares})
    return rows, default, adapters(default, args.model)


def random_sizes(name: str, facts: int, like: Manifest) -> dict[str, Any]:
    """A patch and a LoRA of random factors on one weight of that model, as files."""
    d_out, d_in = SIZES[name]
    rank = facts * RANKS_A_FACT
    draws = np.random.default_rng(0)
    left, right = (draws.normal(0, 0.02, shape) for shape in ((d_out, rank), (rank, d_out)))
    count = int(np.gcd(d_in, 48))
    module = ModuleBase(
        shape=(d_out, d_in), dtype="bfloat16", digest="0" * 64, blocks=("0" * 64,) * count
    )
    base = like.base.model_copy(update={"modules": {MODULE: module}})
    manifest = like.model_copy(update={"base": base})
    patch = Patch.build(manifest, {MODULE: Delta.multiplicative(left, right, DEFAULT)})
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "patch.st"), Path(folder, "adapter.safetensors")
        patch.write(ours)
        kind = DTYPES[DEFAULT]
        save_file(
            {
                f"base_model.model.{MODULE}.lora_A.weight": torch.zeros(rank, d_in, dtype=kind),
                f"base_model.model.{MODULE}.lora_B.weight": torch.zeros(d_out, rank, dtype=kind),
            },
            theirs,
        )
        sizes = ours.stat().st_size, theirs.stat().st_size
    return {
        "patch": f"{name}, {facts} facts, rank {rank}",
        "bytes": sizes[0],
        "of the LoRA": sizes[0] / sizes[1],
        "of the tensors": sizes[0] / tensors(patch),
    }


def checks(
    facts: int, default: Patch, loras: Mapping[str, int], larger: Sequence[Mapping[str, Any]]
) -> list[Check]:
    """The two bars, on the real patch and on every larger weight at as many facts."""
    size, rank = len(default.data), max(delta.rank for delta in default.deltas.values())
    d_in = next(iter(default.manifest.base.modules.values())).shape[1]
    why = (
        f"a delta of rank r holds 2 d_out r numbers, so 2 r / d_in of the weight's: at {d_in}"
        f" inputs 1/100 holds to rank {d_in // 200}, and {facts} facts take {rank}: their own"
        " prompts' keys, and those of their other wordings. A lower rank lets answers back (see the"
        " rows), and a rank below the number of facts can't tell them apart. It would take fewer"
        " facts a patch, or a wider model"
    )
    manifest = "the manifest (digests of every column block) outweighs factors of so low a rank"
    name = f"real model, {facts} facts"
    found = [
        at_most(f"{name}: patch / LoRA, both {DEFAULT}", size / loras[DEFAULT], LORA, manifest),
        at_most(f"{name}: patch / tensors", size / tensors(default), TENSORS, why),
    ]
    for row in larger:
        found.append(at_most(f"{row['patch']}: patch / LoRA", row["of the LoRA"], LORA, manifest))
        found.append(
            at_most(f"{row['patch']}: patch / tensors", row["of the tensors"], TENSORS, "")
        )
    return found


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--data", type=Path, default=REPOSITORY / "tests/data")
    parser.add_argument("--facts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.parts, args.characters = ((4,), 4000) if args.quick else ((2, 4), 12000)
    rows, default, loras = real(args)
    sizes = {name: {n: random_sizes(name, n, default.manifest) for n in FACTS} for name in SIZES}
    larger = [sizes[name][10] for name in list(SIZES)[1:]]
    for dtype, size in loras.items():
        rows.append({"patch": f"LoRA of it, {dtype}", "bytes": size})
    rows += [{"patch": "the tensors", "bytes": tensors(default)}]
    rows += [row for of in sizes.values() for row in of.values()]
    shares = [
        line(name, {n: Spread.of([row["of the tensors"]]) for n, row in of.items()})
        for name, of in sizes.items()
    ]
    found = document(
        "How many bytes does a patch take, and what would fewer cost?",
        rows,
        checks(args.facts, default, loras, larger),
        args,
        notes=[
            f"{DEFAULT} is the default. A figure of every row: of the facts, of other wordings and"
            " of other facts that the unpatched model answers, and perplexity over its own",
            f"the manifest is {manifest_bytes(default):,} bytes of the real patch, and does not"
            " shrink: with one fact it outweighs what rank 2 saves over a LoRA on a small weight",
        ],
        plot=Plot("facts in a patch", "bytes, of the changed tensors'", shares, TENSORS, "xy"),
    )
    return finish(found, args)


if __name__ == "__main__":
    sys.exit(main())
