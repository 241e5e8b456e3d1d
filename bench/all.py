"""All benches of ``make bench``, one after another, and the page that tells what they found.

    python bench/all.py                     runs them and writes docs/benchmarks.md
    python bench/all.py --only fold stack   those alone; the others' last documents stay
    python bench/all.py --render            writes the page again of the kept documents

Each script runs in a process of its own with ``--json``. Its document is kept in
``docs/benchmarks/NAME.json``, its plot in ``NAME.svg``; no figure of the page is typed by hand.
A script that fails, takes too long or is missing is told there, too (``failed.json``), makes the
exit code 1, and leaves its last document. A bar that is missed is told, and no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
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
FAILED = "failed.json"
LONGEST, ENDING = 600, 30  # seconds of one script, and to stop what it has started
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
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    failed = {} if args.render else run_all(kept, args)
    write_page(args.docs)
    for name, reason in failed.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


def run_all(kept: Path, args: argparse.Namespace) -> dict[str, str]:
    """Run the scripts that are asked for and keep what they say; why those that failed did."""
    begun = time.monotonic()
    failed: dict[str, str] = {}
    for name in args.only:
        try:
            run(name, kept, args)
        except FailedError as error:
            failed[name] = str(error)
    others = {n: why for n, why in failures(kept).items() if n not in args.only}
    (kept / FAILED).unlink(missing_ok=True)
    if failed or others:
        write_json(kept / FAILED, {**others, **failed})
    print(f"{time.monotonic() - begun:.0f} s in all", file=sys.stderr)
    return failed


class FailedError(Exception):
    """A script gave no document; the reason names no path."""


def run(name: str, kept: Path, args: argparse.Namespace) -> None:
    """Run one script and keep its document.

    Raises FailedError.
    """
    words = [f"bench/{name}.py", "--json", "--device", args.device]
    words += ["--quick"] if args.quick else []
    print(f"{name} …", file=sys.stderr, flush=True)
    begun = time.monotonic()
    found = document_of(words)
    write_json(kept / f"{name}.json", found)
    missed = sum(not check["ok"] for check in found["checks"])
    told = f"{missed} of {len(found['checks'])} bars missed" if missed else "every bar holds"
    print(f"{name}: {told}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def document_of(words: list[str]) -> dict[str, Any]:
    """What a script prints; raises FailedError."""
    if not (ROOT / words[0]).is_file():
        raise FailedError("there is no such script")
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        raise FailedError(f"no document within {LONGEST} s") from None
    finally:
        end(process)
    try:
        found: dict[str, Any] = json.loads(said)
        page({words[0]: found})  # what can't be told is no document
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FailedError(f"exit code {process.returncode}, no document") from None
    if process.returncode not in (0, 1):
        raise FailedError(f"exit code {process.returncode} after its document")
    return found


def end(process: subprocess.Popen[str]) -> None:
    """End a script and all that it started: asked first, as engines have groups of their own."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=ENDING)
        except subprocess.TimeoutExpired:
            print("it does not end by itself", file=sys.stderr)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def failures(kept: Path) -> dict[str, str]:
    """Why scripts failed when they ran last, by name."""
    path = kept / FAILED
    found: dict[str, str] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def write_page(docs: Path) -> None:
    """``benchmarks.md`` and the plots, of the documents that are kept."""
    kept = docs / "benchmarks"
    found = {name: kept / f"{name}.json" for name in NAMES}
    held = {n: json.loads(p.read_text("utf-8")) for n, p in found.items() if p.exists()}
    for name, one in held.items():
        if one["plot"]:
            draw(one, kept / f"{name}.svg")
    (docs / "benchmarks.md").write_text(page(held, failures(kept)), "utf-8")


def page(
    documents: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str] | None = None
) -> str:
    """The page of the documents, by script. ``failed``: why, of those that failed last."""
    parts = [HEAD, *machines(documents)]
    parts += [told_failure(name, why, name in documents) for name, why in (failed or {}).items()]
    absent = [name for name in NAMES if name not in documents and name not in (failed or {})]
    if absent:
        parts.append(f"Not run yet: {', '.join(absent)}.\n")
    parts += summary(documents)
    for name, one in documents.items():
        parts += section(name, one)
    return "\n".join(parts).rstrip() + "\n"


def told_failure(name: str, why: str, before: bool) -> str:
    left = "what stands here is of a run before" if before else "nothing of it stands here"
    return f"**{name} failed** when it ran last ({why}); {left}.\n"


def summary(documents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """All checks."""
    checks = [(name, check) for name, one in documents.items() for check in one["checks"]]
    held = sum(bool(check["ok"]) for _, check in checks)
    seconds = sum(one["seconds"] for one in documents.values())
    rows = [
        (f"[{name}](#{name})", check["name"], check["value"], f"{check['bar']:g}", verdict(check))
        for name, check in checks
    ]
    return [
        f"{held} of {len(checks)} bars hold; the scripts took {seconds:.0f} s together.\n",
        table(["script", "what", "value", "bar", ""], rows),
    ]


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table with an empty line after it; a bar in a cell is no border."""
    cells = [[cell(value).replace("|", "\\|") for value in row] for row in [heads, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{' --- |' * len(heads)}", *lines[1:], ""])


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
        parts.append(table(heads, ([row.get(head, "") for head in heads] for row in one["rows"])))
    if one["plot"]:
        alt = " by ".join(filter(None, (one["plot"]["y"], one["plot"]["x"])))
        parts.append(f"![{alt}](benchmarks/{name}.svg)\n")
    parts += [f"{note}.\n" if not note.endswith(".") else f"{note}\n" for note in one["notes"]]
    missed = [check for check in one["checks"] if not check["ok"]]
    if missed:
        parts.append("What was missed:\n")
        parts += [
            f"- {check['name']}: {cell(check['value'])}, the bar is {check['bar']:g}"
            f" ({verdict(check)}). {check.get('why', 'Why is not known.')}"
            for check in missed
        ]
        parts.append("")
    return parts


def draw(one: Mapping[str, Any], path: Path) -> None:
    """The plot of a document; the same bytes for the same document."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "patcher", "svg.fonttype": "none"})
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
    if plot.get("ticks"):
        axes.set_xticks(range(len(plot["ticks"])), plot["ticks"], fontsize="x-small")
    axes.set(xlabel=plot["x"], ylabel=plot["y"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
