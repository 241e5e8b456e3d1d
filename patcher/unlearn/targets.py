"""Target values as the editing papers find them: one vector a fact, by gradient.

For each fact a change of what one layer's down projection puts out at the subject's last
token is sought so that the model says what it should (Meng et al. 2022, arXiv 2202.05262,
equation 4; 2023, arXiv 2210.07229, equation 16). Minimised by Adam, over the fact's prompts:

    mean miss + KL_WEIGHT KL(before | after) on "SUBJECT is a" + DECAY |change| / |state|²

where the miss is the negative log-probability of what is to be said, a token, or by how
many nats the answer's log-odds exceed ``wishes.SUPPRESS``; within a ball of CLAMP times
the norm of the state that it is added to. The papers do that for one fact after the other
with full passes; here many facts share a batch, passes begin at the edited layer, and a
fact that is met leaves the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .forward import continuations, hidden, keys, logits, pad
from .job import Job
from .models import Model
from .prompts import Encoded, last_token
from .reference import subject_of
from .slopes import TOKENS
from .upward import Entering, added, agrees, entering, leaving, stepping_over
from .wishes import SUPPRESS, wishes_for

STEPS = 25
RATE = 0.5  # the papers' 0.1 does not reach the end of text on a small model
CLAMP = 0.75
DECAY = 0.5
KL_WEIGHT = 0.0625
ENOUGH = 0.05  # nats a token: a fact whose miss is less is met
OPENINGS = ("The", "Therefore", "Because", "I", "You")  # of the papers' generated prefixes
PREFIX = 10  # tokens of such a prefix, its opening aside


@dataclass
class Passes:
    """What the search has cost: ``layers``, summed over sequences, run forward and back."""

    steps: int = 0
    layers: int = 0


class Row(NamedTuple):
    """One sequence: ``said`` is wanted after ``ids`` less its last tokens; none: KL alone."""

    ids: list[int]
    subject: int
    said: list[int]
    fact: int


@dataclass
class _Batch:
    """The rows of some facts, ready to run."""

    rows: list[Row]
    ids: torch.Tensor  # [b, length]
    at: torch.Tensor  # [b]
    fact: torch.Tensor  # [b], counted from 0 within the batch
    kept: Entering | None  # None: full passes
    before: dict[int, torch.Tensor] = field(default_factory=dict)  # row -> log-probabilities [v]

    def only(self, active: torch.Tensor) -> _Batch:
        """The rows of the facts that are ``active`` ``[m]`` bool."""
        chosen = active[self.fact].nonzero()[:, 0]
        rows = chosen.tolist()
        return _Batch(
            [self.rows[i] for i in rows],
            self.ids[chosen],
            self.at[chosen],
            self.fact[chosen],
            self.kept and self.kept.rows(chosen),
            {new: self.before[old] for new, old in enumerate(rows) if old in self.before},
        )


def values(
    job: Job,
    layer: int,
    *,
    batched: bool = True,
    said: Sequence[list[int]] | None = None,
    passes: Passes | None = None,
) -> torch.Tensor:
    """The change of what that layer's down projection puts out, ``[n, d_out]`` float32.

    Args:
        job: facts, model, target; its augmented prompts count like the facts' own.
        layer: zero-based.
        batched: many facts at a time and from ``layer`` upwards. False: the published
            way, fact after fact, full passes, each prompt also after five generated
            prefixes. No prefix goes before a chat.
        said: of each fact the ids that are to be said; None: as the job's target has it.
        passes: is added to.
    """
    model = job.model
    prefixes = [] if batched else _prefixes(model)
    rows = [_rows(job, i, said, prefixes) for i in range(len(job.facts))]
    suppress = said is None and job.settings.target == "suppress"
    counted = passes if passes is not None else Passes()
    found = torch.zeros(len(rows), len(model.weight(model.module_name(layer))))
    found = found.to(model.device)
    upward = batched
    done = 0
    job.progress.start("Target values", len(rows))
    for group in _groups(rows) if batched else ([i] for i in range(len(rows))):
        batch = _prepare(model, layer, [rows[i] for i in group], upward)
        if upward and not done and batch.kept and not agrees(model, batch.ids, batch.kept):
            upward = False
            batch.kept = None
        found[group] = _descend(model, layer, batch, suppress, counted)
        done += len(group)
        job.progress.step(done)
    job.progress.finish()
    return found


def _rows(
    job: Job, index: int, said: Sequence[list[int]] | None, prefixes: Sequence[list[int]]
) -> list[Row]:
    """The fact's prompts, other prompts of it, and what must stay known of its subject."""
    read, fact, own = job.model.tokenizer, job.facts[index], job.encoded[index]
    prompts = [own, *(job.augmented[index] if job.augmented else ())]
    result = []
    for prompt in prompts:
        wanted = said[index] if said is not None else _said(job, prompt)
        result.append(Row([*prompt.prompt, *wanted[:-1]], prompt.subject, wanted, index))
    for prefix in prefixes if fact.messages is None else ():
        first = result[0]
        ids = [*prefix, *first.ids]
        result.append(Row(ids, first.subject + len(prefix), first.said, index))
    text = f"{subject_of(fact)} is a"
    ids = read(text).input_ids
    place = last_token(read, text, (0, len(subject_of(fact))), len(ids))
    return [*result, Row(ids, place, [], index)]


def _said(job: Job, prompt: Encoded) -> list[int]:
    return [wish.token for wish in wishes_for([prompt], job.settings.target, job.model.tokenizer)]


def _prefixes(model: Model) -> list[list[int]]:
    """Greedy texts of ten tokens and a full stop; the papers sample theirs."""
    read = model.tokenizer
    openings = [read(text).input_ids for text in OPENINGS]
    texts = continuations(model, openings, PREFIX)
    stop = read(". ", add_special_tokens=False).input_ids
    return [[*o, *text, *stop] for o, text in zip(openings, texts, strict=True)]


def _groups(rows: Sequence[Sequence[Row]]) -> Iterator[list[int]]:
    """Facts of like length whose rows, padded, have at most ``TOKENS`` tokens together."""
    longest = [max(len(row.ids) for row in own) for own in rows]
    group: list[int] = []
    count = 0
    for i in sorted(range(len(rows)), key=lambda i: (longest[i], i)):
        if group and (count + len(rows[i])) * longest[i] > TOKENS:
            yield group
            group, count = [], 0
        group.append(i)
        count += len(rows[i])
    if group:
        yield group


def _prepare(model: Model, layer: int, facts: Sequence[Sequence[Row]], upward: bool) -> _Batch:
    rows = [row._replace(fact=i) for i, own in enumerate(facts) for row in own]
    ids = pad([row.ids for row in rows], model.device)
    at = torch.tensor([row.subject for row in rows], device=model.device)
    fact = torch.tensor([row.fact for row in rows], device=model.device)
    return _Batch(rows, ids, at, fact, entering(model, ids, layer) if upward else None)


def _descend(
    model: Model, layer: int, batch: _Batch, suppress: bool, passes: Passes
) -> torch.Tensor:
    """The changes ``[m, d_out]`` of the facts of a batch."""
    size, limit = _sizes(model, layer, batch)
    change = torch.zeros(len(size), len(model.weight(model.module_name(layer))))
    change = change.to(model.device).requires_grad_()
    adam = torch.optim.Adam([change], lr=RATE)
    active = torch.ones(len(size), dtype=torch.bool, device=model.device)
    now = batch
    for step in range(STEPS):
        with torch.enable_grad():
            miss, drift = _losses(model, layer, now, change, suppress, remember=step == 0)
            decay = DECAY * change.norm(dim=1) / size**2
            loss = (miss + KL_WEIGHT * drift + decay)[active].sum()
        passes.steps += 1
        passes.layers += len(now.rows) * (model.layers - (layer if now.kept else 0))
        if step == 0:
            batch.before = now.before
        active = active & (miss.detach() >= ENOUGH)
        if step == STEPS - 1 or not active.any():
            break
        (slope,) = torch.autograd.grad(loss, change)
        held = change.detach().clone()
        change.grad = slope
        adam.step()
        with torch.no_grad():
            change *= (limit / change.norm(dim=1).clamp_min(1e-30)).clamp(max=1)[:, None]
            change.copy_(torch.where(active[:, None], change, held))
        now = batch.only(active)
    return change.detach()


def _losses(
    model: Model,
    layer: int,
    batch: _Batch,
    change: torch.Tensor,
    suppress: bool,
    *,
    remember: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By fact ``[m]``: the mean miss of its prompts, and the mean drift of the others."""
    places = [
        (i, len(row.ids) - max(1, len(row.said)) + j)
        for i, row in enumerate(batch.rows)
        for j in range(max(1, len(row.said)))
    ]
    with (
        stepping_over(model, batch.kept) if batch.kept else nullcontext(),
        added(model, layer, change[batch.fact], batch.at),
    ):
        states = hidden(model, batch.ids)
    scores = logits(model, states[[p[0] for p in places], [p[1] for p in places]])
    misses: list[list[torch.Tensor]] = [[] for _ in change]
    drifts: list[list[torch.Tensor]] = [[] for _ in change]
    begin = 0
    for i, row in enumerate(batch.rows):
        raw = scores[begin : begin + max(1, len(row.said))]
        own = raw.log_softmax(-1)
        begin += len(own)
        if not row.said:
            if remember:
                batch.before[i] = own[0].detach()
            old = batch.before[i]
            drifts[row.fact].append((old.exp() * (old - own[0])).sum())
        elif suppress:
            misses[row.fact].append((_odds(raw[0], row.said[0]) - SUPPRESS).clamp(min=0))
        else:
            misses[row.fact].append(-own[range(len(own)), row.said].mean())
    return _means(misses, change), _means(drifts, change)


def _odds(scores: torch.Tensor, token: int) -> torch.Tensor:
    """The log-odds of a token, of logits ``[v]``."""
    rest = torch.cat([scores[:token], scores[token + 1 :]]).logsumexp(0)
    return scores[token] - rest


def _means(parts: list[list[torch.Tensor]], like: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.stack(p).mean() if p else like.new_zeros(()) for p in parts])


@torch.no_grad()
def _sizes(model: Model, layer: int, batch: _Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """By fact ``[m]``: the norm of the state that is changed, and how large a change may be."""
    firsts = {row.fact: row for row in reversed(batch.rows)}
    rows = [firsts[i] for i in range(len(firsts))]
    sequences, positions = [row.ids for row in rows], [row.subject for row in rows]
    weight = model.weight(model.module_name(layer))
    own = keys(model, sequences, positions, [layer])[layer] @ weight.T
    state = leaving(model, sequences, positions, layer)
    gain = passed_on(own, leaving(model, sequences, positions, layer, own) - state)
    # Where an output is normalised before it is added to the state, its own size counts.
    size = state.norm(dim=1) / gain if gain else own.norm(dim=1)
    return size, CLAMP * size


def passed_on(change: torch.Tensor, moved: torch.Tensor) -> float | None:
    """The factor by which a layer adds ``change [n, d]`` to its state; None: it isn't linear."""
    factor = float((change * moved).sum() / (change * change).sum().clamp_min(1e-30))
    plain = (moved - factor * change).norm() <= 1e-3 * moved.norm() and factor > 0
    return factor if plain else None
