"""Patches go on and off a busy engine at random: nothing fails, and every token is accounted for.

Clients of mixed lengths, streaming and not, ask greedily while stacks change at random under
`recompute`, `continue` and `drain`. Each answer names the weight versions that it came from and
the token since which each was in force. Afterwards, on the quiet engine, every span is scored
under its own stack, teacher-forced: each of its tokens must be the likeliest one there, or lie
within TOLERANCE of it. Comparing bits would be wrong: another batch rounds differently, and a
near-tie may fall the other way. As a control each span is scored under another stack too, where
it must not pass. What a request said after a change under `continue` came from no one version;
it is counted, not scored.

    python bench/soak.py [--seconds 120] [--seed 0] [--model DIR] [--clients 4] [--json]

Exit code 0 if every check holds, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from load import MODEL, TEXT, Answer, Server, ask, random_patches, serving, tokenised

from patcher.client import Engine
from patcher.engine.stack import Stack
from patcher.protocol import InFlight

TOLERANCE = 0.35  # nats between a token and the likeliest one: what bfloat16 and batches do
POLICIES: tuple[InFlight, ...] = ("recompute",) * 5 + ("continue",) * 3 + ("drain",)
PROMPTS = (12, 40, 120, 300, 700)  # tokens
ANSWERS = (4, 16, 48, 120)
GROWTH_MB, GROWTH_SHARE, GROWTH_FILES = 48.0, 0.05, 8


class Load:
    """Clients in threads of their own, until :meth:`stop`."""

    def __init__(self, server: Server, prompts: list[list[int]], clients: int, seed: int) -> None:
        self.answers: list[Answer] = []
        self.failures: list[str] = []
        self._server, self._prompts = server, prompts
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}/{n}"),))
            for n in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, draw: random.Random) -> None:
        with httpx.Client(base_url=self._server.url, timeout=300) as client:
            while not self._over.is_set():
                prompt, tokens = draw.choice(self._prompts), draw.choice(ANSWERS)
                try:
                    answer = ask(client, prompt, tokens, stream=draw.random() < 0.5)
                except Exception as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    continue
                if answer.ended != "length" or len(answer.tokens) != tokens:
                    self.failures.append(f"{len(answer.tokens)} of {tokens}, {answer.ended}")
                self.answers.append(answer)


class Resources(threading.Thread):
    """Memory (MB) and open files of each process of the server, once a second."""

    def __init__(self, group: int) -> None:
        super().__init__(daemon=True)
        self.seen: dict[int, list[tuple[float, int]]] = defaultdict(list)
        self.over = threading.Event()
        self._group = group

    def run(self) -> None:
        while not self.over.wait(1.0):
            for pid in _processes(self._group):
                try:
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    files = len(os.listdir(f"/proc/{pid}/fd"))
                except OSError:
                    continue
                self.seen[pid].append((pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files))

    def growth(self) -> list[dict[str, float]]:
        """Of each process: what it held in the middle third, and what it grew by in the last."""
        found = []
        for pid, seen in self.seen.items():
            third = len(seen) // 3
            if third < 3:
                continue
            middle, last = seen[third : 2 * third], seen[2 * third :]
            memory = [median(m for m, _ in part) for part in (middle, last)]
            files = [median(f for _, f in part) for part in (middle, last)]
            found.append(
                {
                    "pid": pid,
                    "mb": round(memory[0], 1),
                    "grown_mb": round(memory[1] - memory[0], 1),
                    "files": files[0],
                    "grown_files": files[1] - files[0],
                }
            )
        return found


def _processes(group: int) -> list[int]:
    """The processes of a session: vLLM's workers make groups of their own, but no sessions."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if entry.name.isdigit() and int(fields[3]) == group:
            found.append(int(entry.name))
    return found


def change_at_random(
    engine: Engine, stacks: Sequence[tuple[str, ...]], seconds: float, draw: random.Random
) -> list[dict[str, Any]]:
    """Go from stack to stack until the time is over; what each change cost."""
    changes: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    at: tuple[str, ...] = ()
    while time.monotonic() < end:
        time.sleep(min(draw.uniform(0.1, 4.0), max(0.0, end - time.monotonic())))
        to, policy = draw.choice([s for s in stacks if s != at]), draw.choice(POLICIES)
        change = engine.set_stack(to, expect=Stack(at).version, in_flight=policy)
        changes.append({"policy": policy, **change})
        at = to
    return changes


def score(client: httpx.Client, answer: Answer) -> list[float]:
    """By how many nats each of its tokens misses the likeliest, under the stack in force."""
    whole = [*answer.prompt, *answer.tokens]
    body = {"model": "m", "prompt": whole, "max_tokens": 1, "prompt_logprobs": 1}
    reply = client.post("/v1/completions", json={**body, "temperature": 0})
    reply.raise_for_status()
    found = reply.json()["choices"][0]["prompt_logprobs"][len(answer.prompt) :]
    return [
        max(entry["logprob"] for entry in at.values()) - at[str(token)]["logprob"]
        for at, token in zip(found, answer.tokens, strict=True)
    ]


def pieces(answer: Answer) -> list[tuple[str, int, int]]:
    """Each version with the first of its tokens and the one after its last."""
    ends = [since for _, since in answer.spans[1:]] + [len(answer.tokens)]
    found = [(v, s, e) for (v, s), e in zip(answer.spans, ends, strict=True) if e > s]
    if answer.mixed_since_head:  # from which token on isn't known
        return []
    return found[:1] if answer.mixed else found


def judge(
    client: httpx.Client,
    engine: Engine,
    answers: Iterable[Answer],
    stacks: Sequence[tuple[str, ...]],
) -> dict[str, Any]:
    """Score every span under its own stack, and each answer's first under another."""
    by_version = {Stack(ids).version: ids for ids in stacks}
    order = list(by_version)
    due: dict[str, list[tuple[Answer, int, int, bool]]] = defaultdict(list)
    unknown = 0
    for answer in answers:
        for number, (version, start, end) in enumerate(pieces(answer)):
            if version not in by_version:
                unknown += 1
                continue
            due[version].append((answer, start, end, True))
            if number == 0:
                foreign = order[(order.index(version) + 1) % len(order)]
                due[foreign].append((answer, start, end, False))
    missed: dict[bool, list[float]] = {True: [], False: []}
    tokens = 0
    for version, spans in due.items():
        engine.set_stack(by_version[version], expect=engine.status()["weight_version"])
        for answer, start, end, its_own in spans:
            missed[its_own].append(max(score(client, answer)[start:end]))
            tokens += (end - start) * its_own
    own, other = missed[True], missed[False]
    return {
        "spans": len(own),
        "tokens": tokens,
        "unknown_versions": unknown,
        "worst_nats": round(max(own, default=0.0), 3),
        "spans_with_near_ties": sum(m > 0 for m in own),
        "wrong": sum(m > TOLERANCE for m in own),
        "control_told_apart": round(sum(m > TOLERANCE for m in other) / max(1, len(other)), 3),
    }


def soak(options: argparse.Namespace) -> dict[str, Any]:
    patches = random_patches(options.model, 3, options.seed, options.scale)
    a, b, c = (patch.id for patch in patches)
    stacks = [(), (a,), (b,), (a, b), (c, b, a)]
    draw = random.Random(options.seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(options.model, Path(folder)) as server,
        Engine(server.url, server.token, timeout=120) as engine,
        httpx.Client(base_url=server.url, timeout=300) as client,
    ):
        for patch in patches:
            engine.upload(patch)
        text = tokenised(client, TEXT.read_text())
        prompts = [text[n * 50 : n * 50 + length] for n, length in enumerate(PROMPTS)]
        resources = Resources(server.process.pid)
        resources.start()
        load = Load(server, prompts, options.clients, options.seed)
        try:
            changes = change_at_random(engine, stacks, options.seconds, draw)
        finally:
            load.stop()
            resources.over.set()
            resources.join()
        verified = engine.verify()["ok"]
        sample = draw.sample(load.answers, min(options.judged, len(load.answers)))
        judged = judge(client, engine, sample, stacks)
    return report(options, load, changes, resources.growth(), judged, verified)


def report(
    options: argparse.Namespace,
    load: Load,
    changes: list[dict[str, Any]],
    growth: list[dict[str, float]],
    judged: dict[str, Any],
    verified: bool,
) -> dict[str, Any]:
    pauses = sorted(change["pause_ms"] for change in changes)
    crossing = [answer for answer in load.answers if len(answer.spans) > 1]
    mixed = [answer for answer in load.answers if answer.mixed]
    grown = [p for p in growth if p["grown_mb"] > max(GROWTH_MB, GROWTH_SHARE * p["mb"])]
    checks = {
        "no request failed": not load.failures,
        "every answer names known versions": judged["unknown_versions"] == 0,
        "every scored span is its own stack's": judged["wrong"] == 0 and judged["spans"] > 0,
        "other stacks are told apart": judged["control_told_apart"] > 0.5,
        "weights verify at the end": verified,
        "memory is flat": bool(growth) and not grown,
        "file handles are flat": all(p["grown_files"] <= GROWTH_FILES for p in growth),
    }
    return {
        "seconds": options.seconds,
        "seed": options.seed,
        "model": options.model.name,
        "requests": {
            "answered": len(load.answers),
            "failed": len(load.failures),
            "failures": load.failures[:5],
            "across_changes": len(crossing),
            "mixed": len(mixed),
        },
        "changes": {
            "made": len(changes),
            **Counter(change["policy"] for change in changes),
            "pause_ms_median": median(pauses) if pauses else None,
            "pause_ms_longest": pauses[-1] if pauses else None,
            "spaced_ms_longest": max((change["spaced_ms"] for change in changes), default=None),
            "went_on_mixed": sum(change["mixed"] for change in changes),
        },
        "judged": judged,
        "processes": growth,
        "checks": checks,
        "ok": all(checks.values()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="of load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--scale", type=float, default=8.0, help="strength of the random edits")
    parser.add_argument("--judged", type=int, default=400, help="answers that are scored at most")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    found = soak(options)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for name in ("requests", "changes", "judged"):
            print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in found[name].items()))
        for check, held in found["checks"].items():
            print(f"{'holds' if held else 'FAILS'}: {check}")
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
