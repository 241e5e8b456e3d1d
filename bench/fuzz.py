"""Does any file make the reader do something else than read it whole or refuse it?

    make fuzz                                            1,000,000 inputs in two processes
    python -m bench.fuzz --inputs 20000 --processes 1    a short one
    python -m bench.fuzz --keep                          puts what reached new code into the corpus

Atheris (libFuzzer) chooses inputs by what they reach in `patcher.patch`; the changes are those of
`tests/patch/mutations.py`, which know the container. Of each input `mutations.holds` must hold,
within 10 s and 2 GB. An input of which it doesn't is kept in the corpus as `crash-…` or
`timeout-…`, where the suite replays it from then on. Exit code 1 at a finding, 2 where a process
ended without having run its share.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tests" / "patch" / "corpus"
KEPT_BYTES = 4096  # of an input that --keep takes
LIMITS = ("-timeout=10", "-rss_limit_mb=2048", "-max_len=65536", "-print_final_stats=1")


def worker(options: argparse.Namespace) -> None:
    """Run a share of the inputs in this process; libFuzzer ends it."""
    import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]

    with atheris.instrument_imports(include=["patcher.patch", "rfc8785"]):
        from tests.patch import mutations

    counts: Counter[str] = Counter()

    def one(data: bytes) -> None:
        counts["read" if mutations.holds(data) else "refused"] += 1
        if sum(counts.values()) % 1000 == 0:  # libFuzzer ends without a word to Python
            Path(options.told).write_text(json.dumps(counts))

    def changed(data: bytes, most: int, seed: int) -> bytes:
        def scramble(part: bytes) -> bytes:
            return bytes(atheris.Mutate(part, len(part) + 64))

        return mutations.mutate(data, Random(seed), scramble)[:most]

    atheris.Setup([options.name or sys.argv[0], *options.rest], one, custom_mutator=changed)
    atheris.Fuzz()


def start(folder: Path, number: int, options: argparse.Namespace) -> subprocess.Popen[str]:
    """A process with a corpus of its own; its output goes to a file in ``folder``."""
    fresh = folder / f"corpus-{number}"
    fresh.mkdir()
    runs = options.inputs // options.processes
    command = [sys.executable, "-m", "bench.fuzz", "--worker", "--told", str(told(folder, number))]
    command += ["--", f"-runs={runs}", f"-seed={options.seed + number}", *LIMITS]
    command += [f"-artifact_prefix={CORPUS}/", str(fresh), str(CORPUS), str(golden(folder))]
    with log(folder, number).open("w") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, text=True)


def golden(folder: Path) -> Path:
    """A folder with the golden patches alone."""
    place = folder / "golden"
    if not place.exists():
        place.mkdir()
        for path in (ROOT / "tests" / "golden" / "v1").glob("*.safetensors"):
            (place / path.name).write_bytes(path.read_bytes())
    return place


def log(folder: Path, number: int) -> Path:
    """Where a process's output is."""
    return folder / f"log-{number}"


def told(folder: Path, number: int) -> Path:
    """Where a process counts what became of its inputs."""
    return folder / f"told-{number}"


def summary(folder: Path, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What all processes together did."""
    texts = [log(folder, n).read_text(errors="replace") for n in range(options.processes)]
    done = [re.findall(r"stat::number_of_executed_units: *(\d+)", text) for text in texts]
    covered = [re.findall(r"\bcov: (\d+)", text) for text in texts]
    counts: Counter[str] = Counter()
    for number in range(options.processes):
        place = told(folder, number)
        counts.update(json.loads(place.read_text()) if place.exists() else {})
    inputs = sum(int(found[-1]) for found in done if found)
    return {
        "inputs": inputs,
        "read": counts["read"],
        "refused": counts["refused"],
        "seconds": round(seconds, 1),
        "per_second": round(inputs / seconds, 1),
        "covered": max((int(found[-1]) for found in covered if found), default=0),
        "findings": [],
    }


def keep(folder: Path) -> int:
    """Make the corpus the smallest set of inputs that reach all that was reached; its size."""
    merged, again = folder / "merged", folder / "again.sh"
    merged.mkdir()
    command = [sys.executable, "-m", "bench.fuzz", "--worker", "--told", str(folder / "counted")]
    # libFuzzer starts itself again for a merge, by its own name and without our words.
    words = shlex.join([*command, "--name", str(again), "--"])
    again.write_text(f'#!/bin/sh\ncd {shlex.quote(str(ROOT))} && exec {words} "$@"\n')
    again.chmod(0o700)
    sources = [*folder.glob("corpus-*"), CORPUS, golden(folder)]
    flags = ["-merge=1", f"-max_len={KEPT_BYTES}", str(merged), *map(str, sources)]
    subprocess.run([str(again), *flags], check=True, capture_output=True)
    for path in CORPUS.iterdir():
        if re.fullmatch(
            "[0-9a-f]{40}", path.name
        ):  # libFuzzer's name; others were put there by hand
            path.unlink()
    for path in merged.iterdir():
        shutil.copy(path, CORPUS)
    return len(list(merged.iterdir()))


def main() -> int:
    """Run, tell, and answer with an exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--told", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
    CORPUS.mkdir(exist_ok=True)
    before = set(CORPUS.iterdir())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        golden(folder)
        began = time.monotonic()
        running = [start(folder, number, options) for number in range(options.processes)]
        codes = [process.wait() for process in running]
        found = summary(folder, options, time.monotonic() - began)
        found["findings"] = sorted(path.name for path in set(CORPUS.iterdir()) - before)
        if options.keep and not any(codes):
            found["kept"] = keep(folder)
        if any(codes):
            failed = next(n for n, code in enumerate(codes) if code)
            print("\n".join(log(folder, failed).read_text().splitlines()[-40:]), file=sys.stderr)
    if options.json:
        print(json.dumps(found))
    else:
        print("  ".join(f"{key} {value}" for key, value in found.items() if key != "findings"))
        print(f"crashes {len(found['findings'])}", *found["findings"])
    if found["findings"]:
        return 1
    return 2 if any(codes) or found["inputs"] < options.inputs - options.processes else 0


if __name__ == "__main__":
    sys.exit(main())
