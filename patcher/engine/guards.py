"""Guards on the live engine: prepared before a change, asked right after its commit.

While they are asked the engine serves, with the new weights. Each is asked of every
data-parallel engine; the worst engine counts. What can't be told counts as a breach.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from patcher.engine import vllm_client, vllm_generation
from patcher.errors import EngineRefusedError, GuardBreachedError, InputError
from patcher.guards import LIKELY, LOSS, SAID, Guard
from patcher.protocol import GuardResult
from patcher.text import says

DEADLINE = 60.0  # seconds that all guards of a change may take together, before and after each
ABORT_PATIENCE = 5.0  # seconds that late requests get to be aborted
CONCURRENCY = 8  # requests at once, so that guards don't crowd out those who are served
SHOWN = 5  # breaches that a message spells out
logger = logging.getLogger("vllm.patcher")

Measured = str | float | None  # what was said, a probability, a loss; None: not to be had


@dataclass(frozen=True)
class Question:
    """One request to each engine, for bounds that can share it.

    ``ids``: the prompt's, or with ``first`` all ids, whose part from ``first`` on is judged.
    """

    guard: Guard
    bounds: tuple[str, ...]
    ids: list[int]
    first: int = 0


class GuardRun:
    """The guards of one change. ``results`` has them once they were asked."""

    def __init__(self, client: Any, guards: Sequence[Guard]) -> None:
        self._client = client
        self._guards = [
            one if one.name else one.model_copy(update={"name": f"guard {number}"})
            for number, one in enumerate(guards, 1)
        ]
        self._questions: list[Question] = []
        self._before: dict[tuple[int, int], tuple[Measured, str]] = {}
        self.results: list[GuardResult] = []

    async def prepare(self) -> None:
        """Tokenise all, and measure what relative bounds will be compared with.

        Raises :class:`InputError` where the engine can't be asked a guard, and
        :class:`EngineRefusedError` where it can't answer now. Nothing has changed by then.
        """
        if not self._guards:
            return
        if not vllm_generation.can_answer(self._client):
            raise EngineRefusedError(
                "Guards can't be asked of an LLM that only this script may step.",
                "Ask it after the change, and revert what you don't like; or serve the model.",
            )
        if await vllm_client.is_paused(self._client):
            raise EngineRefusedError(
                "Somebody paused the engine: guards get no answer.", "Resume it, or give no guards."
            )
        numbers = any(name in (*LIKELY, *LOSS) for one in self._guards for name in one.bounds)
        if numbers and not vllm_generation.gives_log_probabilities(self._client):
            raise EngineRefusedError(
                "The engine gives logits in place of log-probabilities.",
                "Start it with --logprobs-mode raw_logprobs, or guard answers only.",
            )
        for guard in self._guards:
            self._questions += await self._put(guard)
        self._before = await self._measure(lambda question: "max_ratio" in question.bounds)
        for (number, _), (_, problem) in self._before.items():
            if problem:
                raise EngineRefusedError(
                    f"Guard {self._questions[number].guard.name!r} could not be measured before "
                    f"the change: {problem}.",
                    "Nothing was changed; try again when the engine is less busy.",
                )

    async def confirm(self) -> None:
        """Ask all guards of the weights that serve now, and fill ``results``.

        Raises :class:`GuardBreachedError` where one doesn't hold.
        """
        if not self._guards:
            return
        found = await self._measure(lambda _: True)
        engines = range(len(vllm_generation.engines(self._client)))
        for number, question in enumerate(self._questions):
            for bound in question.bounds:
                rows = [self._judge(number, bound, engine, found) for engine in engines]
                self.results.append(max(rows, key=_badness))
        breached = [row for row in self.results if not row["ok"]]
        if breached:
            raise self._breach(breached)

    def told(self) -> dict[str, Any]:
        """What the ledger gets of them: nothing where none was asked."""
        return {"guards": self.results} if self.results else {}

    async def _put(self, guard: Guard) -> list[Question]:
        """The questions that answer the guard's bounds."""
        try:
            if guard.text is not None:
                ids = await vllm_generation.encode(self._client, guard.text)
                questions = [Question(guard, guard.bounds, ids, first=1)]
            else:
                questions = await self._about_answers(guard)
        except Exception as error:  # tokenizers and chat templates raise what they like
            raise InputError(
                f"The engine can't read guard {guard.name!r} ({type(error).__name__}).",
                f"It takes {vllm_generation.most_tokens(self._client)} tokens at most; "
                "for messages its tokenizer needs a chat template.",
            ) from None
        for question in questions:
            room = 1 if question.first else guard.tokens
            if len(question.ids) <= question.first:
                raise InputError(
                    f"Guard {guard.name!r} has too few tokens to be measured.", "Give a longer one."
                )
            if len(question.ids) + room > vllm_generation.most_tokens(self._client):
                raise InputError(
                    f"Guard {guard.name!r} is too long: {len(question.ids)} tokens, and {room} "
                    f"for the answer, where {vllm_generation.most_tokens(self._client)} fit.",
                    "Shorten it.",
                )
        return questions

    async def _about_answers(self, guard: Guard) -> list[Question]:
        client, chat = self._client, guard.messages is not None
        if guard.messages is not None:
            prompt = vllm_generation.chat(client, [m.model_dump() for m in guard.messages])
        else:
            prompt = guard.prompt or ""
        special = not chat  # a template writes its special tokens itself
        ids = await vllm_generation.encode(client, prompt, special=special)
        said = tuple(name for name in guard.bounds if name in SAID)
        questions = [Question(guard, said, ids)] if said else []
        if guard.target is not None:
            # Joined as `compute` joins a fact's prompt and target (unlearn/prompts.py).
            joint = "" if chat or prompt[-1:].isspace() else " "
            tail = joint + guard.target.strip()
            whole = await vllm_generation.encode(client, prompt + tail, special=special)
            if whole[: len(ids)] != ids or len(whole) <= len(ids):
                whole = ids + await vllm_generation.encode(client, tail, special=False)
            likely = tuple(name for name in guard.bounds if name in LIKELY)
            questions.append(Question(guard, likely, whole, first=len(ids)))
        return questions

    async def _measure(
        self, wanted: Callable[[Question], bool]
    ) -> dict[tuple[int, int], tuple[Measured, str]]:
        """Ask each wanted question of each engine: (question, engine) -> (answer, problem)."""
        turns = asyncio.Semaphore(CONCURRENCY)
        tasks = {
            asyncio.ensure_future(self._ask(question, engine, turns)): (number, place)
            for number, question in enumerate(self._questions)
            if wanted(question)
            for place, engine in enumerate(vllm_generation.engines(self._client))
        }
        if not tasks:
            return {}
        try:
            await asyncio.wait(tasks, timeout=DEADLINE)
            late = {at: task for task, at in tasks.items() if not task.done()}
        finally:
            for task in tasks:
                task.cancel()  # vLLM then aborts the request
            await asyncio.wait(tasks, timeout=ABORT_PATIENCE)
        found: dict[tuple[int, int], tuple[Measured, str]] = {}
        for task, at in tasks.items():
            too_late = f"no answer within {DEADLINE:.0f} s"
            found[at] = (None, too_late) if at in late else task.result()
        return found

    async def _ask(
        self, question: Question, engine: int | None, turns: asyncio.Semaphore
    ) -> tuple[Measured, str]:
        try:
            async with turns:
                return await self._answer(question, engine), ""
        except Exception as error:  # its words might quote the guard
            logger.warning("patcher: a guard got no answer (%s)", type(error).__name__)
            return None, f"the engine did not answer ({type(error).__name__})"

    async def _answer(self, question: Question, engine: int | None) -> Measured:
        if not question.first:
            return await vllm_generation.continuation(
                self._client, question.ids, question.guard.tokens, engine
            )
        nats = await vllm_generation.log_probabilities(
            self._client, question.ids, question.first, engine
        )
        return math.exp(sum(nats)) if question.guard.text is None else -sum(nats) / len(nats)

    def _judge(
        self,
        number: int,
        bound: str,
        engine: int,
        found: dict[tuple[int, int], tuple[Measured, str]],
    ) -> GuardResult:
        guard = self._questions[number].guard
        limit = getattr(guard, bound)
        measured, problem = found[number, engine]
        value: float | bool | None = None
        if isinstance(measured, str):
            value = _is_said(measured, bound, limit)
        elif measured is not None:
            before = self._before.get((number, engine), (None, ""))[0]
            value = _ratio(measured, before) if bound == "max_ratio" else measured
            if not math.isfinite(value):
                value, problem = None, "not a finite number"
        return {
            "guard": guard.name,
            "bound": bound,
            "limit": None if bound in SAID else limit,
            "value": value,
            "ok": value is not None and _holds(bound, value, limit),
            "engine": engine,
            "problem": problem,
        }

    def _breach(self, breached: Sequence[GuardResult]) -> GuardBreachedError:
        told = "; ".join(map(_told, breached[:SHOWN]))
        more = f"; and {len(breached) - SHOWN} more" if len(breached) > SHOWN else ""
        return GuardBreachedError(
            f"Of {len(self.results)} guarded bounds {len(breached)} did not hold: {told}{more}.",
            "The stack before is in force again; compute a milder patch, or look at the guards.",
            guards=list(self.results),
        )


def _is_said(text: str, bound: str, words: str) -> bool:
    if bound == "must_start_with":
        return text.lstrip().startswith(words.strip())
    return says(text, words)


def _holds(bound: str, value: float | bool, limit: Any) -> bool:
    if bound in SAID:
        return bool(value) is (bound != "must_not_contain")
    return bool(value >= limit) if bound == "min_probability" else bool(value <= limit)


def _ratio(after: float, before: Measured) -> float:
    """Perplexity after over before, from mean losses in nats."""
    if not isinstance(before, float):
        return math.nan
    try:
        return math.exp(after - before)
    except OverflowError:
        return math.inf


def _badness(row: GuardResult) -> tuple[bool, bool, float]:
    value = float(row["value"] or 0.0)
    return not row["ok"], row["value"] is None, -value if row["bound"].startswith("min") else value


def _told(row: GuardResult) -> str:
    what = f"{row['guard']!r} {row['bound']}"
    if row["value"] is None:
        return f"{what}: {row['problem']}"
    return what if row["limit"] is None else f"{what} {row['limit']:g}: {row['value']:.4g}"
