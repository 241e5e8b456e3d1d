"""The main job on real input: a served model forgets, and takes it back.

Takes SmolLM2-135M-Instruct and facts that it knows, computes one patch while a real vLLM server
starts, applies it while a client streams, asks about the forgotten facts and their neighbours,
reverts, and compares the answers with those at the start, byte for byte. Everything goes
through the `patcher` command and vLLM's own HTTP API, as a user would do it.

    make demo

Exit code 0 if every claim of the last table holds, else 1. The server ends with it, always.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from patcher.cli.output import facts as pairs
from patcher.cli.output import short, size, table

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / ".models" / "smollm2-135m-instruct"
FACTS = REPOSITORY / "tests" / "data" / "facts.jsonl"
FORGOTTEN = 5
NEIGHBOURS = 20
STREAMED = 200  # tokens of the story that is told meanwhile
START_S = 300
PATIENCE_S = 20.0  # with a process that is asked to end

Fact = dict[str, Any]


class Answer(NamedTuple):
    """What the server said: the text, and everything of it that is compared at the end."""

    text: str
    all: str

    def gives(self, fact: Fact) -> bool:
        return self.text.strip().startswith(fact["target"].strip())


class Steps:
    """How long what took, and what came out of it."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []
        self.began = time.monotonic()

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[list[str]]:
        print(f"— {what} …", flush=True)
        began, result = time.monotonic(), []  # type: float, list[str]
        yield result
        self.rows.append((what, f"{time.monotonic() - began:.1f} s", "; ".join(result)))


class Server:
    """`patcher serve` in a process group of its own, which ends with this object."""

    def __init__(self, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{_free_port()}"
        self.log = folder / "server.log"
        words = ["serve", str(MODEL), "--json", "--state", str(folder / "state")]
        words += ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2]]
        words += ["--served-model-name", "smollm2", "--max-model-len", "2048", "--enforce-eager"]
        with self.log.open("wb") as log:
            self.process = _start(words, stdout=subprocess.PIPE, stderr=log)
        assert self.process.stdout is not None
        self.token_file = json.loads(self.process.stdout.read())["token_file"]

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=2).is_success:
                    return
            time.sleep(0.2)
        lines = self.log.read_text(errors="replace").splitlines()[-30:]
        raise SystemExit("\n".join([*lines, "demo: the server did not start; its log ends so"]))

    def ask(self, prompt: str) -> Answer:
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{self.url}/v1/completions", json=body | {"logprobs": 5}, timeout=60)
        choice = answer.raise_for_status().json()["choices"][0]
        compared = {name: choice[name] for name in ("text", "logprobs", "finish_reason")}
        return Answer(choice["text"], json.dumps(compared, sort_keys=True))

    def patcher(self, *words: str) -> dict[str, Any]:
        """A command against this server: what it prints under --json."""
        return _patcher(*words, "--engine", self.url, "--token-file", self.token_file)


class Story(threading.Thread):
    """A client that streams a long answer, and notes when each token came."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.arrivals: list[float] = []
        self.ended = False
        self.error = ""

    def run(self) -> None:
        body = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": STREAMED}
        body |= {"temperature": 0, "stream": True, "ignore_eos": True}
        url = f"{self.server.url}/v1/completions"
        try:
            with httpx.stream("POST", url, json=body, timeout=60) as answer:
                for line in answer.raise_for_status().iter_lines():
                    self.ended |= line == "data: [DONE]"
                    if line.startswith('data: {"'):
                        self.arrivals.append(time.monotonic())
        except httpx.HTTPError as error:
            self.error = f"{type(error).__name__}: {error}"

    def wait_for(self, tokens: int) -> None:
        while len(self.arrivals) < tokens and self.is_alive():
            time.sleep(0.01)


def choose(path: Path) -> tuple[list[Fact], list[Fact]]:
    """Candidates to be forgotten, and neighbours: facts of the same kinds that must stay.

    A few of either are facts that the model doesn't know.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kinds: dict[str, list[Fact]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("relation", "counterfact")), []).append(row)
    # One of each kind in turn, so that there is something of every kind on both sides.
    turns = [kind[i] for i in range(len(rows)) for kind in kinds.values() if i < len(kind)]
    return turns[: 2 * FORGOTTEN], turns[2 * FORGOTTEN : 2 * FORGOTTEN + 2 * NEIGHBOURS]


def ask_all(server: Server, facts: Sequence[Fact]) -> list[Answer]:
    return [server.ask(fact["prompt"]) for fact in facts]


def first_known(
    server: Server, facts: Sequence[Fact], wanted: int
) -> tuple[list[Fact], list[Answer]]:
    """The first facts that it knows, as many as are wanted, and its answers."""
    known: list[tuple[Fact, Answer]] = []
    for fact in facts:
        if len(known) < wanted and (answer := server.ask(fact["prompt"])).gives(fact):
            known.append((fact, answer))
    return [fact for fact, _ in known], [answer for _, answer in known]


def tell(steps: Steps, folder: Path, server: Server) -> bool:
    """The whole story; True if every claim holds."""
    candidates, others = choose(FACTS)
    patch = folder / "forget.st"
    with steps.step(f"compute a patch against {FORGOTTEN} facts (the server starts)") as said:
        forget_file = folder / "forget.jsonl"
        forget_file.write_text("".join(json.dumps(fact) + "\n" for fact in candidates))
        words = ["--model", str(MODEL), "--forget", str(forget_file), "-o", str(patch)]
        computed = _patcher("compute", *words, "--known-only", "--limit", str(FORGOTTEN))
        said.append(f"{size(computed['bytes'])}, rank {max(computed['modules'].values())}")
        said.append(f"the first {computed['known']} that it knows of {computed['facts']}")
    with steps.step("wait for the server"):
        server.wait()
    with steps.step("ask it, unpatched") as said:
        forget, before = first_known(server, candidates[: computed["facts"]], FORGOTTEN)
        known, kept_before = first_known(server, others, NEIGHBOURS)
        said.append(f"knows {len(forget)} of {computed['known']}; {len(known)} neighbours")
    with steps.step("apply the patch while a client streams") as said:
        story, change = stream_through(server, patch)
        said.append(f"serving paused for {change['pause_ms']:.0f} ms")
    with steps.step("ask again, patched") as said:
        after, kept_after = ask_all(server, forget), ask_all(server, known)
        said.append(f"knows {count(forget, after)} of {len(forget)}")
        said.append(f"{count(known, kept_after)} of {len(known)} neighbours")
    with steps.step("verify the live weights") as said:
        verified = server.patcher("verify")
        said.append(f"{len(verified['modules'])} modules as they must be")
    with steps.step("revert") as said:
        reverted = server.patcher("revert", short(computed["id"]))
        said.append(f"serving paused for {reverted['pause_ms']:.0f} ms")
    with steps.step("ask a third time, reverted"):
        again, kept_again = ask_all(server, forget), ask_all(server, known)

    show(forget, before, after, again)
    same = [*before, *kept_before] == [*again, *kept_again]
    gaps = [b - a for a, b in zip(story.arrivals, story.arrivals[1:], strict=False)]
    gap = f"{max(gaps, default=0.0):.2f} s"
    return claims(
        [
            ("the server knew the facts", len(forget) == computed["known"] == FORGOTTEN),
            ("patched, it gives none of them", count(forget, after) == 0),
            (
                f"neighbours kept: {count(known, kept_after)} of {len(known)} (at least 9 in 10)",
                len(known) == NEIGHBOURS and count(known, kept_after) >= 0.9 * NEIGHBOURS,
            ),
            (
                f"the stream got all {STREAMED} tokens, the longest gap {gap}",
                story.ended and not story.error and len(story.arrivals) >= STREAMED,
            ),
            ("the live weights were what base and patch give", verified["ok"] is True),
            ("nothing is in force after the revert", reverted["stack"] == []),
            (f"all {len(before) + len(known)} answers and log-probabilities are again "
             "the first ones, byte for byte", same),
        ]
    )  # fmt: skip


def stream_through(server: Server, patch: Path) -> tuple[Story, dict[str, Any]]:
    """Apply the patch in the middle of a stream, and let the stream end."""
    story = Story(server)
    story.start()
    story.wait_for(STREAMED // 8)
    change = server.patcher("apply", str(patch), "--reason", "the demo")
    if not story.is_alive():
        raise SystemExit("demo: the stream ended before the patch was applied; make it longer")
    story.join()
    return story, change


def count(facts: Sequence[Fact], answers: Sequence[Answer]) -> int:
    return sum(answer.gives(fact) for fact, answer in zip(facts, answers, strict=True))


def show(forget: Sequence[Fact], *answers: Sequence[Answer]) -> None:
    print()
    rows = [
        (fact["prompt"], *(_brief(answer.text) for answer in three))
        for fact, *three in zip(forget, *answers, strict=True)
    ]
    table(["asked", "at the start", "patched", "reverted"], rows)


def claims(rows: Sequence[tuple[str, bool]]) -> bool:
    print()
    pairs([("holds" if holds else "FAILS", claim) for claim, holds in rows])
    return all(holds for _, holds in rows)


def _brief(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 32 else f"{line[:31]}…"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(words: Sequence[str], **streams: Any) -> subprocess.Popen[bytes]:
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "patcher", *words],
        env=os.environ | settings,
        start_new_session=True,
        **streams,
    )
    _STARTED.append(process)
    return process


def _patcher(*words: str) -> dict[str, Any]:
    process = _start([*words, "--json"], stdout=subprocess.PIPE)
    output, _ = process.communicate()
    _STARTED.remove(process)
    document: dict[str, Any] = json.loads(output)
    if process.returncode != 0:
        raise SystemExit(f"demo: patcher {words[0]} ended with {process.returncode}")
    return document


_STARTED: list[subprocess.Popen[bytes]] = []


def _stop_all() -> None:
    # Nothing may stop this: neither a second Ctrl-C nor an impatient caller.
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    for ending in (signal.SIGTERM, signal.SIGKILL):
        running = [process for process in _STARTED if _group_lives(process)]
        for process in running:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, ending)
        deadline = time.monotonic() + PATIENCE_S
        while any(map(_group_lives, running)) and time.monotonic() < deadline:
            time.sleep(0.1)


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # so that a dead leader doesn't count as alive
    try:
        os.killpg(process.pid, 0)
    except OSError:
        return False
    return True


def _asked_to_end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    for one in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, _asked_to_end)
    for name in [name for name in os.environ if name.startswith("PATCHER_")]:
        del os.environ[name]  # the demo's own engine and state, nobody else's
    steps = Steps()
    with tempfile.TemporaryDirectory(prefix="patcher-demo-") as name:
        try:
            held = tell(steps, Path(name), Server(Path(name)))
        except KeyboardInterrupt:
            print("demo: interrupted", file=sys.stderr)
            return 130
        finally:
            _stop_all()
    print()
    table(["step", ">took", "result"], steps.rows)
    total = time.monotonic() - steps.began
    print(f"\n{'Every claim holds' if held else 'NOT every claim holds'}; {total:.0f} s in all.")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
