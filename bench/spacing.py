"""What fast changes do to streams, with and without spacing, in one run.

Eight streams over long contexts; twenty changes 0.25 s apart under `recompute`. Without spacing
each change makes all streams compute their contexts again before they said anything.

    python bench/spacing.py [--model DIR] [--context 450] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from load import MODEL, TEXT, Answer, Server, ask, random_patches, serving, tokenised

from patcher.client import Engine
from patcher.patch import Patch

STREAMS, CHANGES, APART = 8, 20, 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--context", type=int, default=450, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each answer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    patch = random_patches(options.model, 1, seed=0)[0]
    found: dict[str, Any] = {"streams": STREAMS, "changes": CHANGES, "apart_s": APART}
    found |= {"context": options.context, "tokens": options.tokens}
    for name, spacing, changes in (
        ("no changes", "0", 0),
        ("not spaced", "0", CHANGES),
        ("spaced", "10", CHANGES),
    ):
        with (
            tempfile.TemporaryDirectory() as folder,
            serving(options.model, Path(folder), PATCHER_SPACING=spacing) as server,
        ):
            found[name] = measure(server, patch, options.context, options.tokens, changes)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for name, figures in found.items():
        if isinstance(figures, dict):
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))


def measure(
    server: Server, patch: Patch, context: int, tokens: int, changes: int
) -> dict[str, float]:
    """Seconds: the longest gap within a stream, its median, all streams, all changes."""
    with httpx.Client(base_url=server.url, timeout=600) as client:
        text = tokenised(client, TEXT.read_text())
        prompts = [text[n * 10 : n * 10 + context] for n in range(STREAMS)]
        ask(client, prompts[0][:20], 4, stream=True)
        answers: list[Answer] = []
        readers = [
            threading.Thread(target=lambda p=p: answers.append(ask(client, p, tokens, stream=True)))
            for p in prompts
        ]
        began = time.monotonic()
        for reader in readers:
            reader.start()
        time.sleep(3)
        changing = time.monotonic()
        with Engine(server.url, server.token) as engine:
            for number in range(changes):
                due = changing + number * APART
                time.sleep(max(0.0, due - time.monotonic()))
                if number % 2:
                    engine.revert(all=True)
                else:
                    engine.apply(patch)
        changed = time.monotonic()
        for reader in readers:
            reader.join()
    gaps = [b - a for answer in answers for a, b in pairwise(answer.times)]
    if len(answers) != STREAMS or any(len(a.tokens) != tokens for a in answers):
        raise SystemExit("a stream was lost")
    return {
        "longest_gap_s": round(max(gaps), 2),
        "median_gap_s": round(statistics.median(gaps), 3),
        "streams_s": round(time.monotonic() - began, 1),
        "changes_s": round(changed - changing, 1) if changes else 0.0,
    }


if __name__ == "__main__":
    main()
