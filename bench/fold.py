"""The fold of one module: against one copy of the weight and against its two products alone.

    python bench/fold.py [--quick] [--json] [--device cuda]

One multiplicative delta of rank 4 to half of d_out on a bfloat16 weight, in the sizes of the
real model and of three larger ones. The peer is the larger of ``copy_`` of the weight
and ``R @ W`` and ``L @ (R W)``, in the dtype that the fold is defined in (float64:
docs/adr/0002), with all operands in that dtype already and memory for the results at hand.
The same products in float32 and bfloat16 are shown for comparison.

Memory is what torch allocates inside the call, at its most, beside the result.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from report import SIZES, Line, Plot, Spread, at_most, document, finish, interleaved, line, options
from report import ratios as divided
from torch.utils._python_dispatch import TorchDispatchMode

from patcher.kernels import LowRank, fold

BAR, SHARE = 1.5, 1 / 8
LARGE = 1e8  # values, from which on a rank takes half a minute
SECONDS = 2.0  # of measuring, for each size and rank
WHY_TIME = (
    "at high ranks the products are cut into pieces that fit the memory that is allowed, and run"
    " below the speed of whole ones; at low ranks a fold reads the weight twice and converts it"
    " each time, which the products, whose operands are in float64 already, don't (pieces timed"
    " alone at 3072 x 8192 and rank 4: two readings 10 of 24 ms, products 10, rounding and writing"
    " 5). A fold of a millisecond or two also varies by half from round to round"
)
WHY_MEMORY = (
    "the weight is so small that an eighth of it holds no tile and factors that are worth a call:"
    " 4 MiB are allowed instead; a kernel in one call would need less"
)


class Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that tensors made inside hold, and the most of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            known = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
            if isinstance(one, torch.Tensor):
                self._count(one.untyped_storage(), [a.untyped_storage() for a in known])
        return made

    def count(self, call: Callable[[], Any]) -> None:
        """Make the call and count what it makes; its result is dropped."""
        with self:
            call()

    def _count(self, storage: Any, known: list[Any]) -> None:
        at, size = storage.data_ptr(), storage.nbytes()
        if at in self._seen or any(at == one.data_ptr() for one in known):
            return
        self._seen.add(at)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, at, size)

    def _gone(self, at: int, size: int) -> None:
        self._seen.discard(at)
        self.now -= size


def main() -> int:
    args = options(__doc__).parse_args()
    torch.manual_seed(0)
    sizes = dict(list(SIZES.items())[:2]) if args.quick else SIZES
    rows: list[dict[str, Any]] = []
    lines: list[Line] = []
    for name, (d_out, d_in) in sizes.items():
        found = measure(d_out, d_in, args)
        rows += [{"size": name, "d_out": d_out, "d_in": d_in, **row} for row in found]
        lines.append(line(name, {row["rank"]: row.pop("_ratio") for row in found}))
        for row in rows:
            row.pop("_ratio", None)
    checks = []
    for name in sizes:
        mine = [row for row in rows if row["size"] == name]
        slowest = max(mine, key=lambda row: row["ratio"])
        largest = max(mine, key=lambda row: row["memory"])
        told = f"{name}: time against the peer, worst rank ({slowest['rank']})"
        checks.append(at_most(told, slowest["ratio"], BAR, WHY_TIME))
        told = f"{name}: memory against the weight's, worst rank ({largest['rank']})"
        checks.append(at_most(told, largest["memory"], SHARE, WHY_MEMORY))
        told = f"{name}: bytes kept after the call"
        checks.append(at_most(told, max(row["kept"] for row in mine), 0))
    plot = Plot("rank", "time against the larger of a copy and the two products", lines, BAR)
    question = "How far is a fold from the work that can't be avoided?"
    notes = [f"{torch.get_num_threads()} threads; ratios are medians of rounds in turn"]
    return finish(document(question, rows, checks, args, plot=plot, notes=notes), args)


def measure(d_out: int, d_in: int, args: Any) -> list[dict[str, Any]]:
    device = torch.device(args.device)
    settle = torch.cuda.synchronize if args.device == "cuda" else None
    base = torch.randn(d_out, d_in, device=device).bfloat16()
    wide, out = base.double(), torch.empty_like(base)
    result = torch.empty_like(wide)
    rows = []
    few = args.quick or d_out * d_in > LARGE
    ranks = (4, 64, d_out // 2) if few else (4, 16, 64, 256, d_out // 2)
    fold(base, [delta(d_out, 4, device)], out=out)
    for rank in ranks:
        one = delta(d_out, rank, device)
        left, right = one.left.double(), one.right.double()
        inner = torch.empty(rank, d_in, dtype=torch.float64, device=device)
        plain, allocated = partial(fold, base, [one], out=out), Allocated()
        # A processor does some tens of GFLOP/s: one round of the largest takes half a minute, so
        # its memory is counted in the call that is timed.
        rounds = max(1, min(9, int(SECONDS * 5e10 / (8 * d_out * rank * d_in))))
        ways: dict[str, Callable[[], Any]] = {
            "copy": partial(out.copy_, base),
            "products": partial(products, left, right, wide, inner, result),
            "fold": plain if rounds > 1 else partial(allocated.count, plain),
        }
        took = interleaved(ways, rounds, settle=settle, warm=rounds > 1)
        peer = [max(pair) for pair in zip(took["copy"], took["products"], strict=True)]
        ratio = divided(took["fold"], peer)
        narrow = products_below(one, base, rounds, settle) if rank <= 256 else {}
        if rounds > 1:
            allocated.count(plain)
        rows.append(
            {
                "rank": rank,
                "copy ms": Spread.of(took["copy"]).median * 1e3,
                "products ms": Spread.of(took["products"]).median * 1e3,
                "fold ms": Spread.of(took["fold"]).median * 1e3,
                "ratio": ratio.median,
                "least": ratio.low,
                "most": ratio.high,
                **narrow,
                "memory": allocated.most / base.nbytes,
                "kept": allocated.now,
                "_ratio": ratio,
            }
        )
    return rows


def products(*matrices: torch.Tensor) -> None:
    """``R @ W`` and ``L @`` that, into memory that is there."""
    left, right, weight, inner, result = matrices
    torch.mm(right, weight, out=inner)
    torch.mm(left, inner, out=result)


def products_below(one: LowRank, base: torch.Tensor, rounds: int, settle: Any) -> dict[str, float]:
    """Milliseconds of the same products in narrower dtypes: what float64 costs."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight, left, right = base.to(dtype), one.left.to(dtype), one.right.to(dtype)
        inner, result = right @ weight, torch.empty_like(weight)
        ways = {"it": partial(products, left, right, weight, inner, result)}
        took = interleaved(ways, min(rounds, 3), settle=settle)
        name = str(dtype).removeprefix("torch.")
        found[f"in {name} ms"] = Spread.of(took["it"]).median * 1e3
    return found


def delta(d_out: int, rank: int, device: torch.device) -> LowRank:
    left = torch.randn(d_out, rank, device=device)
    return LowRank("multiplicative", left, torch.randn(rank, d_out, device=device) / d_out)


if __name__ == "__main__":
    sys.exit(main())
