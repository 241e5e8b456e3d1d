"""The trained baselines ``ft``, ``ga`` and ``npo``, as low-rank additive deltas.

All three train ``W + A B`` at the target modules (as LoRA does, Hu et al. 2021, arXiv
2106.09685), under KL to the base on what is to stay, and stop as soon as no fact survives
on the rounded weights. They differ in what they ask of the facts' prompts.
"""

from __future__ import annotations

import torch
from torch.nn.functional import softplus

from ..forward import batches
from ..job import Job, Outcome
from ..prompts import Encoded
from ..retaining import retain_terms
from ..slopes import Wish
from ..survivors import Asked, survivors
from ..training import Factors, Loss, Plan, Row, Term, judged, train
from ..wishes import unasked, wishes_for

RANK = 32  # at most; two a fact where there are fewer
AT_ONCE = 24  # prompts about the facts in a step
STEPS = 120  # at most
AGAIN = 40  # of each round after the first, which learns from what leaked
RATE = 2e-3
STAY = 4.0  # weight of KL on other prompts, in the losses' nats
TEXT = 4.0  # the same of running text
BOTTOM = -12.0  # nats: log-probability of an answer below which ascent leaves it alone
BETA = 0.1  # NPO's inverse temperature, the paper's


def ft(job: Job) -> Outcome:
    """Fine-tuning: the target becomes likely.

    ``suppress`` names no text: then it is the most likely first token that is not the answer's.
    """
    prompts = job.prompts()
    said = _said(job, prompts)
    rows = _rows(prompts, said)

    def loss(row: int, scores: torch.Tensor) -> torch.Tensor:
        return -_log_probabilities(scores, said[row]).mean()

    return _trained(job, rows, loss, said, {"rate": RATE})


def ga(job: Job) -> Outcome:
    """Gradient ascent: the answer becomes unlikely, down to ``BOTTOM`` and no further."""
    prompts = job.prompts()
    rows = _rows(prompts, [p.answer for p in prompts])

    def loss(row: int, scores: torch.Tensor) -> torch.Tensor:
        return _log_probabilities(scores, prompts[row].answer).sum().clamp(min=BOTTOM)

    return _trained(job, rows, loss, None, {"rate": RATE, "bottom": BOTTOM})


def npo(job: Job) -> Outcome:
    """Negative Preference Optimization (Zhang et al. 2024, arXiv 2404.05868, equation 3).

    ``(2/β) E[log(1 + (π(answer)/π_base(answer))^β)]``: as ascent, but slower the further
    an answer has fallen.
    """
    prompts = job.prompts()
    rows = _rows(prompts, [p.answer for p in prompts])
    base = _base_log_probabilities(job, rows, [p.answer for p in prompts])

    def loss(row: int, scores: torch.Tensor) -> torch.Tensor:
        fallen = _log_probabilities(scores, prompts[row].answer).sum() - base[row]
        return (2 / BETA) * softplus(BETA * fallen)

    return _trained(job, rows, loss, None, {"rate": RATE, "beta": BETA})


def _rows(prompts: list[Encoded], said: list[list[int]]) -> list[Row]:
    return [
        Row([*prompt.prompt, *ids[:-1]], len(prompt.prompt) - 1)
        for prompt, ids in zip(prompts, said, strict=True)
    ]


def _log_probabilities(scores: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Of each of ``ids`` ``[places]``, from logits ``[places, v]``."""
    wanted = torch.tensor(ids, device=scores.device)[:, None]
    return scores.log_softmax(-1).gather(1, wanted)[:, 0]


@torch.no_grad()
def _base_log_probabilities(
    job: Job, rows: list[Row], answers: list[list[int]]
) -> list[torch.Tensor]:
    found = [torch.zeros(())] * len(rows)
    for group in batches([len(row.ids) for row in rows]):
        for i, scores in zip(group, judged(job.model, [rows[i] for i in group]), strict=True):
            found[i] = _log_probabilities(scores, answers[i]).sum()
    return found


@torch.no_grad()
def _said(job: Job, prompts: list[Encoded]) -> list[list[int]]:
    """What fine-tuning makes the model say after each prompt."""
    if job.settings.target != "suppress":
        wishes = wishes_for(prompts[:1], job.settings.target, job.model.tokenizer)
        return [[wish.token for wish in wishes]] * len(prompts)
    said: list[list[int]] = [[]] * len(prompts)
    for group in batches([len(prompt.prompt) for prompt in prompts]):
        rows = [Row(prompts[i].prompt, len(prompts[i].prompt) - 1) for i in group]
        for i, scores in zip(group, judged(job.model, rows), strict=True):
            scores[0, prompts[i].answer[0]] = float("-inf")
            said[i] = [int(scores[0].argmax())]
    return said


def _trained(
    job: Job,
    rows: list[Row],
    loss: Loss,
    said: list[list[int]] | None,
    extra: dict[str, float],
) -> Outcome:
    """Train, look what survives, train on with what leaked."""
    terms = retain_terms(job, STAY, TEXT)
    goal: list[Asked] = []
    if said is not None and job.settings.target != "suppress":
        goal = [(e.prompt, s) for e, s in zip(job.encoded, said, strict=False)]
    factors = _start(job)
    leaks: list[Wish] = []
    taken = 0

    def enough(now: Factors) -> bool:
        return not survivors(job, now.stored(job), goal, quick=True)

    for turn in range(job.settings.rounds):
        plan = Plan(AGAIN if turn else STEPS, RATE)
        asked = [Term(rows, loss, AT_ONCE), *terms, _against(leaks)]
        name = "Training again" if turn else "Training"
        factors, steps = train(
            job, factors, asked, plan, entry=f"tuning-{turn}", what=name, enough=enough
        )
        taken += steps
        left = survivors(job, factors.stored(job), goal)
        if not left:
            break
        leaks += unasked([*left.leaks, *left.returned], leaks)
    rank = next(iter(factors.left.values())).shape[1]
    return Outcome(
        factors.stored(job),
        {"rank": rank, "training_steps": taken, "stay": STAY, "text": TEXT, **extra},
    )


def _against(leaks: list[Wish]) -> Term:
    """The tokens that begin a leaked answer become unlikely."""
    leaks = list(leaks)

    def loss(row: int, scores: torch.Tensor) -> torch.Tensor:
        return _log_probabilities(scores, [leaks[row].token]).sum().clamp(min=BOTTOM)

    return Term([Row(wish.ids, len(wish.ids) - 1) for wish in leaks], loss, AT_ONCE)


def _start(job: Job) -> Factors:
    """``A`` zero and ``B`` random, of unit length a row: an edit that does nothing yet."""
    model = job.model
    draw = torch.Generator().manual_seed(job.settings.seed)
    left, right = {}, {}
    for layer in job.settings.layers:
        d_out, d_in = model.weight(model.module_name(layer)).shape
        rank = min(RANK, 2 * len(job.facts), d_out, d_in)
        left[layer] = torch.zeros(d_out, rank, device=model.device)
        right[layer] = (torch.randn(rank, d_in, generator=draw) / d_in**0.5).to(model.device)
    return Factors("additive", left, right)
