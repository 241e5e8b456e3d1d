"""How well every method forgets and how much it leaves alone, on facts that the model knows.

    python bench/quality.py --data DIR                          every method, 10, 50, 200 facts
    python bench/quality.py --data DIR --methods zero "zero --augment" --facts 50 --seed 0
    python bench/quality.py --data DIR --stacked                ten patches of five facts each
    python bench/quality.py --render                            docs/results.md from what is there

Every run is one line of ``bench/results/quality.jsonl``, with its settings and the commit;
one that is there is not run again (``--again`` does). A method is a name of ``patcher
methods``, followed by options of ``patcher.compute`` as on the command line. DIR is laid
out as the project's data; ``tests/data`` works too, with fewer facts. ``--part`` splits
the subjects in two by their SHA-256: what was tuned was tuned on ``tuning`` alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from apart import ApartError, apart, machine
from quality_draws import PARTS, Draw, draw, read, shipped_subjects, split
from quality_page import Line, key, lines_of, write_page
from quality_run import Base, ask, computing, edits_of, revert_each

from patcher.errors import PatcherError
from patcher.unlearn.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/quality.jsonl"
PAGE = ROOT / "docs/results.md"
VARIANTS = ("zero --as-published", "zero --orthogonal")
PATCHES, EACH = 10, 5  # of a stack


def options_of(method: str) -> dict[str, Any]:
    """``compute``'s arguments: ``zero --as-published --target eos`` and the like."""
    name, *words = shlex.split(method)
    found: dict[str, Any] = {"method": name}
    for i, word in enumerate(words):
        if word.startswith("--"):
            value = words[i + 1] if i + 1 < len(words) else "--"
            found[word[2:].replace("-", "_")] = True if value.startswith("--") else value
    return found


def plan(args: argparse.Namespace) -> Iterator[Line]:
    """The runs that are asked for, as the heads of their lines."""
    kind = f"{PATCHES} patches" if args.stacked else "one patch"
    counts = [PATCHES * EACH] if args.stacked else args.facts
    for seed, asked, method in itertools.product(args.seed, counts, args.methods):
        yield {
            "kind": kind,
            "method": method,
            "asked": asked,
            "seed": seed,
            "part": args.part,
            "model": Path(args.model).name,
        }


def run(base: Base, head: Line, drawn: Draw, args: argparse.Namespace) -> Line:
    """The line of one run.

    Raises:
        ApartError: computing failed.
        PatcherError: the patched model can't be measured.
    """
    stacked = head["kind"] != "one patch"
    lots = split(drawn, PATCHES, head["seed"]) if stacked else [drawn.forget]
    options = {"seed": head["seed"], **options_of(head["method"])}
    done = apart(computing, args.model, lots, options, limit=args.limit)
    edits = edits_of(done.result)
    line = {
        **head,
        "facts": len(drawn.forget),
        **ask(base, drawn, edits),
        "seconds": round(done.seconds, 1),
        "bytes": sum(map(len, done.result.patches)),
        "peak_bytes": done.peak,
        "resting_bytes": done.resting,
        "settings": done.result.hyperparameters[0],
    }
    if stacked:
        line["reverted"] = revert_each(base, lots, edits)
    return line


def commit() -> str:
    """The tool's commit; with a ``+`` where the package was changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    return (git("rev-parse", "--short", "HEAD") or "none") + (
        "+" if git("status", "--porcelain", "--", "patcher", "kernels") else ""
    )


def append(path: Path, line: Line) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, sort_keys=True) + "\n")


def measure(args: argparse.Namespace) -> int:
    """All runs that are not there yet; how many failed."""
    begun = time.monotonic()
    there = {key(line) for line in lines_of(args.results) if "failed" not in line}
    data = read(args.data)
    heads = [{**head, "data": data.digest} for head in plan(args)]
    todo = [head for head in heads if args.again or key(head) not in there]
    print(f"{len(todo)} runs of {len(heads)} to do", flush=True)
    if not todo:
        return 0
    base = Base(args.model, data, args.characters)
    pools = base.known(args.part)
    known = [len(pool) for pool in pools]
    shipped = shipped_subjects()
    failed = 0
    for done, head in enumerate(todo):
        if time.monotonic() - begun > args.budget:
            print(f"budget spent; {len(todo) - done} runs are left", flush=True)
            break
        drawn = draw(*pools, head["asked"], head["seed"], shipped)
        try:
            line = run(base, head, drawn, args)
        except (ApartError, PatcherError) as error:
            line = {**head, "failed": str(error)}
            failed += 1
        where = {"commit": commit(), "machine": machine(), "known": known}
        append(args.results, {**line, **where})
        print(told(line), flush=True)
    return failed


def told(line: Line) -> str:
    """A run in one line for people."""
    head = f"{line['method']} · {line['asked']} facts · seed {line['seed']} · {line['kind']}: "
    if "failed" in line:
        return f"{head}failed: {line['failed']}"
    shares = "  ".join(
        f"{name} {yes}/{of}"
        for name, counts in line["figures"].items()
        for yes, of in [totals(counts)]
    )
    ratio = line["perplexity"]["patched"] / line["perplexity"]["base"]
    return f"{head}{shares}  perplexity × {ratio:.4f}  {line['seconds']} s"


def totals(counts: dict[str, int]) -> tuple[int, int]:
    split_ = [(int(y), int(o), n) for k, n in counts.items() for y, o in [k.split("/")]]
    return sum(y * n for y, _, n in split_), sum(o * n for _, o, n in split_)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default=str(ROOT / ".models/smollm2-135m-instruct"))
    add("--data", type=Path, default=ROOT / "tests/data")
    add("--methods", nargs="+", metavar="METHOD", help="default: all; of stacks: zero")
    add("--facts", type=int, nargs="+", default=[10, 50, 200])
    add("--seed", type=int, nargs="+", default=[0, 1, 2])
    add("--part", choices=PARTS, default="unseen")
    add("--stacked", action="store_true", help=f"{PATCHES} patches of {EACH} facts, independent")
    add("--budget", type=float, default=float("inf"), help="seconds; no run begins after them")
    add("--limit", type=float, default=None, help="seconds that computing may take, a run")
    add("--again", action="store_true", help="run what is there, too; the last line counts")
    add("--characters", type=int, default=24_000, help="of the perplexity's text")
    add("--results", type=Path, default=RESULTS)
    add("--render", action="store_true", help="only write docs/results.md and its plots")
    add("--page", type=Path, default=PAGE)
    args = parser.parse_args(words)
    args.methods = args.methods or (["zero"] if args.stacked else [*METHODS, *VARIANTS])
    return args


def main() -> int:
    args = parse()
    if args.render:
        write_page(lines_of(args.results), args.page, args.part)
        return 0
    return 1 if measure(args) else 0


if __name__ == "__main__":
    sys.exit(main())
