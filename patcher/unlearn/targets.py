"""Target values as the editing papers find them: one vector a fact, by gradient.

For each fact a change of what one layer's down projection puts out at the subject's last
token is sought so that the model says what it should (Meng et al. 2022, arXiv 2202.05262,
equation 4; 2023, arXiv 2210.07229, equation 16). Minimised by Adam, over the fact's prompts:

    mean miss + KL_WEIGHT KL(before | after) on "SUBJECT is a" + DECAY |change| / |state|²

where the miss is the negative log-probability of what is to be said, a token, or by how
many nats the answer's log-odds exceed ``wishes.SUPPRESS``; within a ball of CLAMP times
the norm of the state that it is added to. The papers do that for one fact after the other
with full passes; here all facts are sought at once, passes begin at the edited layer and at
the subject's last token, as nothing before these changes, and a fact that is met is left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .forward import continuations, hidden, keys, logits, pad
from .job import Job
from .models import Model
from .prompts import Encoded, last_token
from .reference import subject_of
from .slopes import TOKENS
from .upward import Entering, Span, added, agrees, entering, leaving, upwards
from .wishes import SUPPRESS, wishes_for

STEPS = 25
RATE = 1.0  # the papers' 0.1 does not reach the end of text on a small model
CLAMP = 0.75
DECAY = 0.5
KL_WEIGHT = 0.0625
ENOUGH = 0.1  # nats a token: a fact whose miss is less is met
OPENINGS = ("The", "Therefore", "Because", "I", "You")  # of the papers' generated prefixes
PREFIX = 10  # tokens of such a prefix, its opening aside
WORTH = 64  # tokens from which on a pass of its own costs less than padding
HELD = 4096  # tokens of prompts whose keys and values are held at once


@dataclass
class Passes:
    """What the search has cost: ``tokens``, summed over layers, run forward and back.

    ``courses``: of each group of facts that ran together, by step the time (of
    :func:`time.monotonic`) and the nats by which the facts were missed in all.
    """

    steps: int = 0
    tokens: int = 0
    courses: list[list[tuple[float, float]]] = field(default_factory=list)


class Row(NamedTuple):
    """One sequence: ``said`` is wanted after ``ids`` less its last tokens; none: KL alone.

    ``weight``: of its miss, or drift, in the fact's.
    """

    ids: list[int]
    subject: int
    said: list[int]
    fact: int
    weight: float = 1.0

    @property
    def length(self) -> int:
        """Tokens from the subject's last on."""
        return len(self.ids) - self.subject


@dataclass
class _Lot:
    """Rows that run together."""

    rows: list[Row]
    ids: torch.Tensor  # [b, length]
    kept: Entering | None  # None: full passes
    old: dict[int, torch.Tensor]  # row -> log-probabilities [v] before any change

    @property
    def before(self) -> list[int]:
        """By row how many tokens a pass is not given."""
        past = self.kept and self.kept.past
        return past.places[:, 0].tolist() if past else [0] * len(self.rows)

    @property
    def tokens(self) -> int:
        """How many a pass is given, padded."""
        return (self.kept.ids if self.kept else self.ids).numel()

    def only(self, active: Sequence[bool]) -> _Lot:
        """The rows of the facts that are ``active``."""
        rows = [i for i, row in enumerate(self.rows) if active[row.fact]]
        if len(rows) == len(self.rows):
            return self
        chosen = torch.tensor(rows, dtype=torch.long, device=self.ids.device)
        return _Lot(
            [self.rows[i] for i in rows],
            self.ids[chosen],
            self.kept and self.kept.rows(chosen),
            {new: self.old[i] for new, i in enumerate(rows) if i in self.old},
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
        batched: all facts at once, from ``layer`` upwards and the subject on. False: the
            published way, fact after fact, full passes, each prompt also after five
            generated prefixes. No prefix goes before a chat.
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
    done = 0
    job.progress.start("Target values", len(rows))
    for group in _groups(rows) if batched else ([i] for i in range(len(rows))):
        own = [row._replace(fact=i) for i, fact in enumerate(group) for row in rows[fact]]
        lots = list(_lots(model, layer, own) if batched else _whole(model, own))
        found[group] = _descend(model, layer, own, lots, suppress, counted)
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
    weighed = [row._replace(weight=1 / len(result)) for row in result]
    return [*weighed, Row(ids, place, [], index)]


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
    """Facts, in order, whose rows have at most ``HELD`` tokens together."""
    group: list[int] = []
    count = 0
    for i, own in enumerate(rows):
        tokens = sum(len(row.ids) for row in own)
        if group and count + tokens > HELD:
            yield group
            group, count = [], 0
        group.append(i)
        count += tokens
    if group:
        yield group


def _lots(model: Model, layer: int, rows: Sequence[Row]) -> Iterator[_Lot]:
    """The rows by how much follows their subject, ready to run from there upwards."""
    for lot in _alike(rows):
        ids = pad([row.ids for row in lot], model.device)
        spans = [(row.subject, len(row.ids)) for row in lot]
        yield _Lot(lot, ids, _kept(model, layer, ids, spans), {})


def _kept(model: Model, layer: int, ids: torch.Tensor, spans: Sequence[Span]) -> Entering | None:
    """The most that can be kept so that a pass from there is the full pass; None: nothing.

    Seen on the rows with the most and the fewest tokens before their spans: there a window
    of attention would cut, and the gap before what is kept is widest.
    """
    order = sorted(range(len(spans)), key=lambda i: spans[i][0])
    some = list(dict.fromkeys((order[0], order[-1])))
    for chosen in (spans, None):
        kept = entering(model, ids, layer, chosen)
        full = None if kept.full is None else kept.full[some]
        own = kept.rows(torch.tensor(some, device=ids.device))._replace(full=full)
        if agrees(model, ids[some], chosen and [chosen[i] for i in some], own):
            return kept._replace(full=None)
    return None


def _alike(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows with like numbers of tokens from the subject on: little is padding."""
    lot: list[Row] = []
    for row in sorted(rows, key=lambda row: row.length):
        padded = row.length * (len(lot) + 1)
        if lot and (padded > TOKENS or (padded > WORTH and row.length > 1.5 * lot[0].length)):
            yield lot
            lot = []
        lot.append(row)
    yield lot


def _whole(model: Model, rows: list[Row]) -> list[_Lot]:
    return [_Lot(rows, pad([row.ids for row in rows], model.device), None, {})]


def _descend(
    model: Model,
    layer: int,
    rows: Sequence[Row],
    lots: Sequence[_Lot],
    suppress: bool,
    passes: Passes,
) -> torch.Tensor:
    """The changes ``[m, d_out]`` of the facts whose ``rows`` these are, in ``lots``."""
    size, limit = _sizes(model, layer, rows)
    change = torch.zeros(len(size), len(model.weight(model.module_name(layer))))
    change = change.to(model.device).requires_grad_()
    adam = torch.optim.Adam([change], lr=RATE)
    active = [True] * len(size)
    course: list[tuple[float, float]] = []
    last = [0.0] * len(size)  # of each fact, what it was missed by when it last ran
    passes.courses.append(course)
    for step in range(STEPS):
        lots = [lot for lot in (lot.only(active) for lot in lots) if lot.rows]
        missed, slope = torch.zeros_like(size), torch.zeros_like(change)
        for lot in lots:
            slope += _slope(model, layer, lot, change, suppress, missed)
            passes.tokens += lot.tokens * (model.layers - (layer if lot.kept else 0))
        passes.steps += 1
        now = missed.tolist()
        last = [new if on else old for on, new, old in zip(active, now, last, strict=True)]
        course.append((time.monotonic(), sum(last)))
        active = [on and miss >= ENOUGH for on, miss in zip(active, now, strict=True)]
        if step == STEPS - 1 or not any(active):
            break
        with torch.no_grad():
            norm = change.norm(dim=1)[:, None].clamp_min(1e-30)
            change.grad = slope + DECAY * change / norm / size[:, None] ** 2
            held = change.clone()
            adam.step()
            change *= (limit / change.norm(dim=1).clamp_min(1e-30)).clamp(max=1)[:, None]
            on = torch.tensor(active, device=model.device)
            change.copy_(torch.where(on[:, None], change, held))
    return change.detach()


def _slope(
    model: Model, layer: int, lot: _Lot, change: torch.Tensor, suppress: bool, missed: torch.Tensor
) -> torch.Tensor:
    """The gradient ``[m, d_out]`` of a lot's misses and drifts; its misses join ``missed``."""
    before = lot.before
    places = [
        (i, len(row.ids) - before[i] - max(1, len(row.said)) + j)
        for i, row in enumerate(lot.rows)
        for j in range(max(1, len(row.said)))
    ]
    facts = torch.tensor([row.fact for row in lot.rows], device=model.device)
    at = [row.subject - first for row, first in zip(lot.rows, before, strict=True)]
    with torch.enable_grad():
        with added(model, layer, change[facts], torch.tensor(at, device=model.device)):
            states = upwards(model, lot.kept) if lot.kept else hidden(model, lot.ids)
        scores = logits(model, states[[p[0] for p in places], [p[1] for p in places]])
        loss = change.new_zeros(())
        begin = 0
        for i, row in enumerate(lot.rows):
            raw = scores[begin : begin + max(1, len(row.said))]
            begin += len(raw)
            if row.said:
                miss = row.weight * _miss(raw, row.said, suppress)
                missed[row.fact] += miss.detach()
                loss = loss + miss
            else:
                new = raw[0].log_softmax(-1)
                old = lot.old.setdefault(i, new.detach())
                loss = loss + KL_WEIGHT * row.weight * (old.exp() * (old - new)).sum()
        (slope,) = torch.autograd.grad(loss, change)
    return slope


def _miss(scores: torch.Tensor, said: list[int], suppress: bool) -> torch.Tensor:
    """Nats by which logits ``[said, v]`` fail to say that, or to keep its first token down."""
    if suppress:
        return (_odds(scores[0], said[0]) - SUPPRESS).clamp(min=0)
    return -scores.log_softmax(-1)[range(len(said)), said].mean()


def _odds(scores: torch.Tensor, token: int) -> torch.Tensor:
    """The log-odds of a token, of logits ``[v]``."""
    rest = torch.cat([scores[:token], scores[token + 1 :]]).logsumexp(0)
    return scores[token] - rest


@torch.no_grad()
def _sizes(model: Model, layer: int, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """By fact ``[m]``: the norm of the state that is changed, and how large a change may be."""
    firsts = {row.fact: row for row in reversed(rows)}
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
