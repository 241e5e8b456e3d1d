"""All benches of ``make bench``, one after another, and the page that tells what they found.

    python bench/all.py                     runs them and writes docs/benchmarks.md
    python bench/all.py --only fold stack   those alone; the others' last documents stay
    python bench/all.py --render            writes the page again of the kept documents

Each script runs in a process of its own with ``--json``. Its document is kept in
``docs/benchmarks/NAME.json``, its plot in ``NAME.svg``; no figure of the page is typed by hand.
The exit code is 1 where a script failed. A bar that is missed is told, and no failure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from report import cell

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "fold",
    "stack",
    "decode",
    "apply",
    "compute",
    "start",
    "client",
    "verify",
    "size",
    "overlay",
)
LONGEST = 600  # seconds of one script
HEAD = """# Benchmarks

Written by `make bench` from `docs/benchmarks/*.json`; no figure here is typed by hand. Every ratio
is against a peer of the same run, in turn: medians, with the least and the most drawn as a band.
Times of two runs, or of two machines, don't compare.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--render", action="store_true", help="write the page, run nothing")
    parser.add_argument("--quick", action="store_true", help="each script in under two minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    kept = args.docs / "benchmarks"
    kept.mkdir(parents=True, exist_ok=True)
    failed = [] if args.render else [name for name in args.only if not run(name, kept, args)]
    write_page(args.docs)
    for name in failed:
        print(f"{name} failed: see above", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, kept: Path, args: argparse.Namespace) -> bool:
    """Run one script and keep its document; whether that worked."""
    words = [sys.executable, f"bench/{name}.py", "--json", "--device", args.device]
    words += ["--quick"] if args.quick else []
    print(f"{name} …", file=sys.stderr, flush=True)
    begun = time.monotonic()
    try:
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=LONGEST)
        found = json.loads(done.stdout)
        missed = sum(not check["ok"] for check in found["checks"])
    except (subprocess.TimeoutExpired, ValueError, KeyError, TypeError) as error:
        print(f"{name}: no document ({type(error).__name__})", file=sys.stderr)
        return False
    (kept / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    told = f"{len(found['checks'])} bars, {missed} missed" if missed else "every bar holds"
    print(f"{name}: {told}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return True


def write_page(docs: Path) -> None:
    """``benchmarks.md`` and the plots, of the documents that are kept."""
    found = {name: docs / "benchmarks" / f"{name}.json" for name in NAMES}
    held = {n: json.loads(p.read_text("utf-8")) for n, p in found.items() if p.exists()}
    for name, one in held.items():
        if one["plot"]:
            draw(one, docs / "benchmarks" / f"{name}.svg")
    (docs / "benchmarks.md").write_text(page(held), "utf-8")


def page(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of the documents, by script."""
    parts = [HEAD, *machines(documents)]
    absent = [name for name in NAMES if name not in documents]
    if absent:
        parts.append(f"No document of: {', '.join(absent)}.\n")
    parts.append("| script | what | value | bar | |\n| --- | --- | --- | --- | --- |")
    for name, one in documents.items():
        parts += [
            f"| [{name}](#{name}) | {check['name']} | {cell(check['value'])} | {check['bar']:g} |"
            f" {verdict(check)} |"
            for check in one["checks"]
        ]
    parts.append("")
    for name, one in documents.items():
        parts += section(name, one)
    return "\n".join(parts).rstrip() + "\n"


def verdict(check: Mapping[str, Any]) -> str:
    """Whether the bar holds; how far it was missed."""
    if check["ok"]:
        return "holds"
    value, bar = float(check["value"]), float(check["bar"])
    return f"missed by {abs(value / bar - 1):.0%}" if bar else "missed"


def machines(documents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """On what the documents were measured: once if it was one machine."""
    told: dict[str, list[str]] = {}
    for name, one in documents.items():
        words = ", ".join(f"{k} {v}" for k, v in one["machine"].items())
        told.setdefault(words, []).append(name)
    if len(told) == 1:
        return [f"Measured on: {next(iter(told))}.\n"]
    return [f"{', '.join(names)}: measured on {words}.\n" for words, names in told.items()]


def section(name: str, one: Mapping[str, Any]) -> list[str]:
    """What one script found."""
    quick = " (`--quick`)" if one["quick"] else ""
    parts = [
        f"## {name}\n",
        f"{one['question']} `{one['command']}`{quick}, {one['seconds']:.0f} s.\n",
    ]
    if one["rows"]:
        heads = list(dict.fromkeys(head for row in one["rows"] for head in row))
        parts.append(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
        parts += [
            f"| {' | '.join(cell(row.get(head, '')) for head in heads)} |" for row in one["rows"]
        ]
        parts.append("")
    if one["plot"]:
        parts.append(f"![{one['plot']['y']} by {one['plot']['x']}](benchmarks/{name}.svg)\n")
    parts += [f"{note}.\n" if not note.endswith(".") else f"{note}\n" for note in one["notes"]]
    missed = [check for check in one["checks"] if not check["ok"]]
    if missed:
        parts.append("What was missed:\n")
        parts += [f"- {c['name']}: {cell(c['value'])} of {c['bar']:g}. {c.get('why', '')}".rstrip()
                  for c in missed]  # fmt: skip
        parts.append("")
    return parts


def draw(one: Mapping[str, Any], path: Path) -> None:
    """The plot of a document; the same bytes for the same document."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "patcher"
    from matplotlib import pyplot

    plot = one["plot"]
    figure, axes = pyplot.subplots(figsize=(7, 3.8), layout="constrained")
    for line in plot["lines"]:
        x, median, least, most = zip(*line["points"], strict=True)
        axes.plot(x, median, marker="o", label=line["name"])
        axes.fill_between(x, least, most, alpha=0.15)
    if plot["bar"] is not None:
        axes.axhline(plot["bar"], color="black", linestyle="--", linewidth=1)
    for way, ask in (("x", axes.set_xscale), ("y", axes.set_yscale)):
        if way in plot["log"]:
            ask("log", base=2)
    axes.set(xlabel=plot["x"], ylabel=plot["y"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
