"""A stack of patches on one module: what one more costs, what taking the oldest away costs.

    python bench/stack.py [--quick] [--json] [--device cuda]

1 to 256 multiplicative deltas of rank 4 on a bfloat16 weight. ``fold`` composes a stack and lays
it over the base once; compared, in turn, with one delta of the summed rank (the same work
without the composing), with folding everything again one by one, and with the fold of what
remains when the oldest is taken away. Then: from which summed rank on a dense ``D`` is less
work, measured by forcing either way, against where ``fold`` changes over.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

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

from patcher.kernels import LowRank, fold
from patcher.kernels.compose import dense_is_less

RANK, DEPTHS = 4, (1, 4, 16, 64, 256)
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 1.0)  # summed ranks against d_out, where both ways are measured
BEYOND_RANK = 1.25  # a deep stack against one delta of its summed rank
ONE_FOLD = 1.1  # taking the oldest away against the fold of the rest: the same work
CHANGE_OVER = 1.15  # the way that `fold` takes against the better of the two
WHY = (
    "composing takes the products of all right factors with all left ones and a triangular solve,"
    " which for a weight this small run at half the speed of the fold's own products; keeping"
    " what was composed would save them, for more memory than the weight takes. Of a larger weight"
    " only rows far off their neighbours miss, in one run and not in another: the machine's noise"
)


def main() -> int:
    args = options(__doc__).parse_args()
    torch.manual_seed(0)
    names = ["SmolLM2-135M"] if args.quick else ["SmolLM2-135M", "Llama-3.2-3B"]
    rows: list[dict[str, Any]] = []
    checks, lines = [], []
    for name in names:
        found = [depth(name, count, args) for count in DEPTHS]
        rows += [row for row, _ in found]
        lines.append(line(name, {row["patches"]: spreads[0] for row, spreads in found}))
        worst = [max(row[key] for row, _ in found) for key in ("to one of its rank", "revert")]
        told = f"{name}: a stack against one patch of its summed rank, worst depth"
        checks.append(at_most(told, worst[0], BEYOND_RANK, WHY))
        told = f"{name}: reverting the oldest against the fold of the rest, worst depth"
        checks.append(at_most(told, worst[1], ONE_FOLD))
        told = f"{name}: the way taken (low rank or dense) against the better one, worst rank"
        over = change_over(name, args)
        rows += over
        checks.append(at_most(told, max(row["way taken"] for row in over), CHANGE_OVER))
    plot = Plot("patches", "time against one patch of the summed rank", lines, BEYOND_RANK)
    question = "Does a change cost more the deeper the stack is?"
    notes = [
        f"rank {RANK} each; {torch.get_num_threads()} threads; ms are medians, ratios medians of"
        " rounds in turn"
    ]
    return finish(document(question, rows, checks, args, plot=plot, notes=notes), args)


def depth(name: str, count: int, args: Any) -> tuple[dict[str, Any], list[Spread]]:
    """What ``count`` patches cost in force, one by one, and without the oldest."""
    base, out, settle = weight(name, args)
    deltas = [delta(base, RANK) for _ in range(count)]
    summed = delta(base, RANK * count)
    left = deltas[1:] or [delta(base, RANK)]
    again = [delta(base, RANK) for _ in left]
    rounds = 2 if base.numel() > 1e7 else 9
    took = interleaved(
        {
            "stack": partial(fold, base, deltas, out=out),
            "summed": partial(fold, base, [summed], out=out),
            "reverted": partial(fold, base, left, out=out),
            "rest": partial(fold, base, again, out=out),
        },
        rounds,
        settle=settle,
    )
    alone = {"one by one": partial(one_by_one, base, deltas, out)}
    few = interleaved(alone, 1, settle=settle, warm=False)
    stack, reverted = ratios(took["stack"], took["summed"]), ratios(took["reverted"], took["rest"])
    return {
        "size": name,
        "patches": count,
        "summed rank": RANK * count,
        "stack ms": Spread.of(took["stack"]).median * 1e3,
        "to one of its rank": stack.median,
        "one by one ms": few["one by one"][0] * 1e3,
        "revert ms": Spread.of(took["reverted"]).median * 1e3,
        "revert": reverted.median,
    }, [stack, reverted]


def change_over(name: str, args: Any) -> list[dict[str, Any]]:
    """Both ways around the rank where ``fold`` changes from one to the other."""
    base, out, settle = weight(name, args)
    d_out = base.shape[0]
    rows = []
    for share in SHARES if base.numel() < 1e7 else SHARES[1::2]:
        count = int(share * d_out) // 16
        deltas = [delta(base, 16) for _ in range(count)]
        dense = dense_is_less(16 * count, *base.shape)
        took = interleaved(
            {
                "low rank": partial(forced, base, deltas, out, False),
                "dense": partial(forced, base, deltas, out, True),
            },
            1 if base.numel() > 1e7 else 7,
            settle=settle,
            warm=base.numel() < 1e7,
        )
        ms = {way: Spread.of(seconds).median * 1e3 for way, seconds in took.items()}
        taken = ms["dense" if dense else "low rank"]
        rows.append(
            {
                "size": name,
                "summed rank": 16 * count,
                "rank / d_out": round(16 * count / d_out, 2),
                "low rank ms": ms["low rank"],
                "dense ms": ms["dense"],
                "taken": "dense" if dense else "low rank",
                "way taken": taken / min(ms.values()),
            }
        )
    return rows


def forced(base: torch.Tensor, deltas: Sequence[LowRank], out: torch.Tensor, dense: bool) -> None:
    """``fold`` in the way that is asked for."""
    with mock.patch("patcher.kernels.compose.dense_is_less", return_value=dense):
        fold(base, deltas, out=out)


def one_by_one(base: torch.Tensor, deltas: Sequence[LowRank], out: torch.Tensor) -> None:
    """Every patch in a fold of its own: what doing it without composing takes."""
    fold(base, deltas[:1], out=out)
    for one in deltas[1:]:
        fold(out, [one], out=out)


def weight(name: str, args: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    base = torch.randn(SIZES[name], device=args.device).bfloat16()
    settle = torch.cuda.synchronize if args.device == "cuda" else None
    return base, torch.empty_like(base), settle


def delta(base: torch.Tensor, rank: int) -> LowRank:
    d_out = base.shape[0]
    left = torch.randn(d_out, rank, device=base.device)
    right = torch.randn(rank, d_out, device=base.device) * (0.1 / d_out)
    return LowRank("multiplicative", left, right)


if __name__ == "__main__":
    sys.exit(main())
