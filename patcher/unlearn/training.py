"""Training a low-rank edit by gradient: what is asked of the model, step by step.

The edit stands in hooks at the down projections, so the weights are never touched. Each
step draws some rows of every term, runs them in batches of ``TOKENS``, and lets Adam move
the factors. A draw depends on the seed and the step alone, and the journal keeps the factors,
Adam's moments and what the draws are weighted by: an interrupted training goes on from
its last entry and ends in the bytes of one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import InputError
from ..kernels.low_rank import Kind
from ..patch import Delta
from .forward import batches, hidden, logits, pad
from .job import Deltas, Job
from .journal import Journal
from .models import Model
from .slopes import TOKENS

KEEP = 10  # steps after which an entry is journaled
FLOOR = 0.2  # of the mean need, by which a row is drawn however little it needs it


class Row(NamedTuple):
    """A sequence; the logits at its places from ``start`` on are judged."""

    ids: list[int]
    start: int


Loss = Callable[[int, torch.Tensor], torch.Tensor]  # row, its logits [places, v] -> a number
Penalty = Callable[[dict[int, torch.Tensor]], torch.Tensor]  # left factors by layer -> a number


@dataclass(frozen=True)
class Term:
    """A part of what is minimised: ``weight`` times the mean loss of ``batch`` rows.

    They are drawn by how large their loss was when they were drawn last.
    """

    rows: Sequence[Row]
    loss: Loss
    batch: int
    weight: float = 1.0


@dataclass(frozen=True)
class Factors:
    """The two matrices of every layer's delta, float32, where the model is.

    ``left`` ``[d_out, r]``; ``right`` ``[r, d_out]`` (multiplicative) or ``[r, d_in]``.
    """

    kind: Kind
    left: dict[int, torch.Tensor]
    right: dict[int, torch.Tensor]

    def stored(self, job: Job) -> Deltas:
        """As the patch file holds them."""
        make = Delta.multiplicative if self.kind == "multiplicative" else Delta.additive
        return {
            job.model.module_name(layer): make(left, self.right[layer], job.settings.stored)
            for layer, left in self.left.items()
        }


@dataclass(frozen=True)
class Plan:
    """How long and how fast. ``rate`` falls to ``late`` of it for the last 40 % of ``steps``.

    ``check``: steps after which it is asked whether it is enough. ``right``: whether the
    right factors move too.
    """

    steps: int
    rate: float
    late: float = 0.4
    check: int = 5
    right: bool = True

    def rate_at(self, step: int) -> float:
        """The rate of that step, counted from 0."""
        return self.rate * (self.late if step >= 0.6 * self.steps else 1.0)


def train(
    job: Job,
    factors: Factors,
    terms: Sequence[Term],
    plan: Plan,
    *,
    entry: str,
    what: str,
    enough: Callable[[Factors], bool] | None = None,
    penalty: Penalty | None = None,
) -> tuple[Factors, int]:
    """The trained factors, and how many steps it took.

    Args:
        job: the model, the seed, the journal, the progress.
        factors: to start from; not changed.
        terms: without rows they are passed over.
        plan: how long and how fast.
        entry: the name in the journal; another training of the job needs another one.
        what: the name of the step for the progress.
        enough: asked every ``plan.check`` steps; True ends it.
        penalty: of the left factors, added to the terms.

    Raises:
        InputError: the losses are not finite any more.
    """
    terms = [term for term in terms if term.rows]
    state = _State(factors, [len(term.rows) for term in terms], plan)
    state.restore(job.journal, entry)
    job.progress.start(what, plan.steps)
    while state.step < plan.steps and not state.done:
        draw = torch.Generator().manual_seed(_seed(job.settings.seed, entry, state.step))
        loss = state.move(job.model, terms, plan, draw, penalty)
        at_check = state.step % plan.check == 0 and state.step < plan.steps
        state.done = enough is not None and at_check and enough(state.factors())
        if state.done or state.step % KEEP == 0 or state.step == plan.steps:
            state.save(job.journal, entry)
        job.progress.step(state.step, f"loss {loss:.2f}")
    job.progress.finish()
    return state.factors(), state.step


def _seed(seed: int, entry: str, step: int) -> int:
    """A seed of each step; Python's own hash of a text differs from run to run."""
    return (seed * 1_000_003 + sum(entry.encode()) * 7919 + step) % 2**63


class _State:
    """All that one step hands to the next."""

    def __init__(self, factors: Factors, rows: Sequence[int], plan: Plan) -> None:
        self._kind = factors.kind
        self._left = {k: v.clone().requires_grad_() for k, v in factors.left.items()}
        self._right = {k: v.clone().requires_grad_(plan.right) for k, v in factors.right.items()}
        self._named = {f"left.{layer}": value for layer, value in self._left.items()}
        if plan.right:
            self._named |= {f"right.{layer}": value for layer, value in self._right.items()}
        self._adam = torch.optim.Adam(list(self._named.values()), lr=plan.rate)
        self._needs = [torch.full((n,), float("nan"), dtype=torch.float64) for n in rows]
        self.step = 0
        self.done = False

    def factors(self) -> Factors:
        """As they are now, apart from the graph."""
        plain = [{k: v.detach().clone() for k, v in d.items()} for d in (self._left, self._right)]
        return Factors(self._kind, *plain)

    def move(
        self,
        model: Model,
        terms: Sequence[Term],
        plan: Plan,
        draw: torch.Generator,
        penalty: Penalty | None,
    ) -> float:
        """One step; the loss before it."""
        for group in self._adam.param_groups:
            group["lr"] = plan.rate_at(self.step)
        self._adam.zero_grad()
        total = 0.0
        with torch.enable_grad(), editing(model, Factors(self._kind, self._left, self._right)):
            for term, need in zip(terms, self._needs, strict=True):
                total += _backward(model, term, need, drawn(need, term.batch, draw))
        if penalty is not None:
            with torch.enable_grad():
                extra = penalty(self._left)
                torch.autograd.backward(extra)
            total += extra.item()
        self._adam.step()
        if not all(bool(value.isfinite().all()) for value in self._named.values()):
            raise InputError(
                f"The training is not finite after {self.step + 1} steps.",
                "The model overflows on these prompts: leave some out or choose other layers.",
            )
        self.step += 1
        return total

    def save(self, journal: Journal, entry: str) -> None:
        """Write the entry."""
        kept = {"step": torch.tensor(self.step), "done": torch.tensor(int(self.done))}
        kept |= {f"need.{i}": need for i, need in enumerate(self._needs)}
        for name, value in self._named.items():
            kept[name] = value
            moments = self._adam.state[value]
            kept |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        journal.save(entry, kept)

    @torch.no_grad()
    def restore(self, journal: Journal, entry: str) -> None:
        """Go on from the entry, if it is there and fits."""
        kept = journal.load(entry)
        if kept is None or not self._fits(kept):
            return
        self.step, self.done = int(kept["step"]), bool(kept["done"])
        self._needs = [kept[f"need.{i}"] for i in range(len(self._needs))]
        for name, value in self._named.items():
            value.copy_(kept[name])
            moments = {key: kept[f"{key}.{name}"].to(value) for key in ("exp_avg", "exp_avg_sq")}
            self._adam.state[value] = {"step": torch.tensor(float(self.step)), **moments}

    def _fits(self, kept: dict[str, torch.Tensor]) -> bool:
        wanted = {f"need.{i}": need for i, need in enumerate(self._needs)} | self._named
        return all(name in kept and kept[name].shape == v.shape for name, v in wanted.items())


def drawn(need: torch.Tensor, count: int, draw: torch.Generator) -> list[int]:
    """``count`` rows at most, by their need ``[rows]``, without replacement, sorted.

    Those that were never looked at (NaN) count as the neediest.
    """
    if len(need) <= count:
        return list(range(len(need)))
    seen = need[~need.isnan()]
    most = (float(seen.max()) if len(seen) else 0.0) or 1.0
    weights = need.nan_to_num(nan=most).clamp(min=0)
    weights = weights + FLOOR * weights.mean() + 1e-9
    return sorted(torch.multinomial(weights, count, generator=draw).tolist())


def _backward(model: Model, term: Term, need: torch.Tensor, chosen: list[int]) -> float:
    """Adds the term's slopes, notes in ``need`` what its rows lost; the term's value."""
    total = 0.0
    for group in batches([len(term.rows[i].ids) for i in chosen], TOKENS):
        own = [chosen[i] for i in group]
        scores = judged(model, [term.rows[i] for i in own])
        losses = [term.loss(i, part) for i, part in zip(own, scores, strict=True)]
        summed = torch.stack(losses).sum() * (term.weight / len(chosen))
        if summed.requires_grad:
            torch.autograd.backward(summed)
        need[own] = torch.stack(losses).detach().double().cpu()
        total += summed.item()
    return total


def judged(model: Model, rows: Sequence[Row]) -> tuple[torch.Tensor, ...]:
    """The logits ``[places, v]`` of each row's judged places, of one batch."""
    states = hidden(model, pad([row.ids for row in rows], model.device))
    places = [(r, c) for r, row in enumerate(rows) for c in range(row.start, len(row.ids))]
    scores = logits(model, states[[p[0] for p in places], [p[1] for p in places]])
    return torch.split(scores, [len(row.ids) - row.start for row in rows])


@contextmanager
def editing(model: Model, factors: Factors) -> Iterator[None]:
    """The model with the edit in hooks: what folding does, exact and differentiable."""
    with ExitStack() as hooks:
        for layer, left in factors.left.items():
            module = model.module(layer)
            hook = _hook(module, factors.kind, left, factors.right[layer])
            hooks.callback(module.register_forward_hook(hook).remove)
        yield


def _hook(
    module: torch.nn.Module, kind: Kind, left: torch.Tensor, right: torch.Tensor
) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
    bias = getattr(module, "bias", None)

    def edit(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        if kind == "additive":
            inputs: torch.Tensor = args[0]
            return out + (inputs @ right.T) @ left.T
        # The edit acts on the weight: a bias is no part of what it multiplies.
        return out + ((out if bias is None else out - bias) @ right.T) @ left.T

    return edit
