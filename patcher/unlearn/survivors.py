"""Which facts outlive an edit, asked on the weights as they will be served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .forward import answered, as_edit, continuations, folded
from .job import Deltas, Job
from .slopes import Wish
from .stacking import came_back
from .wishes import GENERATED, leak

Asked = tuple[Sequence[int], Sequence[int]]  # ids of a prompt and of what is to follow


@dataclass(frozen=True)
class Survivors:
    """``still``: facts that are still answered. ``unsaid``: wanted texts that are not said.

    ``leaks``: places where an answer turns up in generated text. ``returned``: where one
    comes back that the stack beneath had forgotten.
    """

    still: list[int]
    unsaid: list[int]
    leaks: list[Wish]
    returned: list[Wish]

    def __bool__(self) -> bool:
        return bool(self.still or self.unsaid or self.leaks or self.returned)


def survivors(
    job: Job,
    deltas: Deltas,
    said: Sequence[Asked] = (),
    *,
    wishes: Sequence[Wish] = (),
    quick: bool = False,
) -> Survivors:
    """What outlives the edit.

    Args:
        job: facts and model.
        deltas: as they are stored.
        said: what the model is to say instead, if anything.
        wishes: those of the last round. Of what comes back again the goal is 2 nats further.
        quick: generate only where nothing else survives.
    """
    model = job.model
    with folded(model, as_edit(deltas)):
        told = answered(model, [(e.prompt, e.answer) for e in job.encoded])
        still = [i for i, yes in enumerate(told) if yes]
        unsaid = [i for i, yes in enumerate(answered(model, list(said))) if not yes]
        if quick and (still or unsaid):
            return Survivors(still, unsaid, [], [])
        found = leaks(job)
        returned = came_back(model, job.earlier, wishes)
    return Survivors(still, unsaid, [wish for wish in found if wish], returned)


def leaks(job: Job) -> list[Wish | None]:
    """Of each fact where its answer turns up in what the model, as it is, generates."""
    tokenizer = job.model.tokenizer
    texts = continuations(job.model, [e.prompt for e in job.encoded], GENERATED)
    return [
        leak(tokenizer, encoded, i, fact.target, text)
        for i, (fact, encoded, text) in enumerate(zip(job.facts, job.encoded, texts, strict=True))
    ]
