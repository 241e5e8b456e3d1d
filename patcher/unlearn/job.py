"""What a method is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..patch import Delta
from ..patch.delta import Stored
from .facts import Fact
from .gate import Strength
from .journal import Journal
from .models import Model
from .progress import Progress
from .prompts import Encoded
from .reference import Probe
from .stacking import Earlier

Deltas = dict[str, Delta]  # module name -> delta as it is stored


@dataclass(frozen=True)
class Settings:
    """The hyperparameters of a computation; all of them go into the manifest."""

    layers: tuple[int, ...]
    target: str = "suppress"
    seed: int = 0
    strength: Strength = field(default_factory=Strength)
    steps: int = 10  # of the first round of values
    again: int = 6  # of every round after it
    rounds: int = 4  # of computing and checking, at most
    text_tokens: int = 16384  # of the reference text that the statistics are taken from
    window: int = 256  # tokens of it that are read together
    #: Weights of what is preserved: running text; the last tokens of other subjects; and in
    #: the facts' wordings the last tokens of other subjects, and all tokens.
    mixture: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    guard: float = 30.0  # how much the margins of other prompts weigh against the keys' cost
    guards: int = 180  # other prompts in the facts' wordings that are guarded, six a fact at most
    guards_apart: int = 60  # other prompts in other wordings
    stored: Stored = "BF16"  # what the file holds
    as_published: bool = False  # `zero` as the paper's code computes it
    orthogonal: bool = False  # `zero` with the paper's orthogonality, on the facts' inputs
    wordings: int = 4  # shipped wordings that a fact is learned in beside its own, at most
    augment: bool = False  # learn from the file's other wordings and generated prefixes too
    layers_by: str = "choice"  # the owner's; or found by `evidence`, or by `depth`
    goal: float = -6.0  # log-odds that an answer's first token is brought below
    goal_elsewhere: float = -2.5  # the same after the facts' other prompts


@dataclass(frozen=True)
class Job:
    """Facts to be forgotten, on a model, beside what is to be preserved.

    ``text``: windows of ids. ``probes``: prompts about other subjects, with those of the
    facts that the owner wants kept. None of them is about the facts. ``augmented``: of
    every fact other prompts with the same answer that a method may learn from; empty, or
    one sequence a fact. ``reworded``: the same as texts. ``retained``: what the owner wants
    kept, chats too, of which ``probes`` has none. ``earlier``: what the stack beneath has
    forgotten, where the owner gave it again.

    Of later attempts to keep within bars: ``firmer``, by fact, nats that its goals lie
    further; ``extra_layers``, edited for those facts alone. ``conditions`` is filled while
    computing: by layer the condition number of what is preserved.
    """

    model: Model
    facts: Sequence[Fact]
    encoded: Sequence[Encoded]
    settings: Settings
    text: Sequence[Sequence[int]]
    probes: Sequence[Probe]
    cache: Path | None
    progress: Progress
    journal: Journal = field(default_factory=Journal)
    augmented: Sequence[Sequence[Encoded]] = ()
    reworded: Sequence[Fact] = ()
    retained: Sequence[Encoded] = ()
    earlier: Earlier = field(default_factory=Earlier)
    firmer: Mapping[int, float] = field(default_factory=dict)
    extra_layers: tuple[int, ...] = ()
    conditions: dict[int, float] = field(default_factory=dict)

    def prompts(self) -> list[Encoded]:
        """The facts' own prompts in their order, and after them the augmented ones."""
        return [*self.encoded, *(other for own in self.augmented for other in own)]


@dataclass(frozen=True)
class Outcome:
    """What a method found: deltas as they are stored, and hyperparameters of its own.

    The latter join the manifest's; they hold no text.
    """

    deltas: Deltas
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)


Method = Callable[[Job], Outcome]
