"""What several benches share: facts of the tuning half, a job of them, and what an edit does.

Defaults are chosen with these benches, so they draw from the half of the subjects that
defaults may be chosen on (``quality_draws.py``).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_draws import Draw, Row, draw, read, shipped_subjects
from quality_run import Base, questions

from patcher.evaluation.asking import Pair, judge
from patcher.unlearn.check import mean_nats
from patcher.unlearn.facts import read_facts
from patcher.unlearn.forward import answered, as_edit, folded
from patcher.unlearn.job import Deltas, Job, Settings
from patcher.unlearn.models import Model
from patcher.unlearn.progress import Silent
from patcher.unlearn.prompts import encode_facts
from patcher.unlearn.reference import reference_text, shipped_probes, windows, without

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Scene:
    """The model, the draw, and what is asked of every edit.

    ``stay``: prompts and answers of other known facts, with the weight that each has in
    the share kept: CounterFact's together a third, the world's two.
    """

    base: Base
    drawn: Draw
    paraphrases: list[Pair]
    stay: list[tuple[Pair, float]]
    before: list[float]

    @property
    def model(self) -> Model:
        return self.base.model


def options(parser: argparse.ArgumentParser, facts: int) -> None:
    parser.add_argument("--model", default=str(ROOT / ".models/smollm2-135m-instruct"))
    parser.add_argument("--data", type=Path, default=ROOT / "tests/data")
    parser.add_argument("--facts", type=int, default=facts)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder for statistics; default: a fresh one")
    parser.add_argument("--quick", action="store_true", help="fewer facts, runs and tokens")
    parser.add_argument("--json", action="store_true", help="one object a line")


def scene(args: argparse.Namespace) -> Scene:
    """The draw of the tuning half."""
    base = Base(args.model, read(args.data), 4_000 if args.quick else 12_000)
    pools = base.known("tuning")
    drawn = draw(*pools, 4 if args.quick else args.facts, args.seed, shipped_subjects())
    asked = questions(base, drawn)
    parts = [(asked["kept_counterfact"], 1 / 3), (asked["kept_world"], 2 / 3)]
    stay = [(pair, w / len(rows)) for rows, w in parts for own in rows for pair in own]
    before = [sum(j.nats) for j in judge(base.model, [pair for pair, _ in stay])]
    paraphrases = [pair for own in asked["paraphrases"] for pair in own]
    return Scene(base, drawn, paraphrases, stay, before)


def job_of(scene_: Scene, args: argparse.Namespace, text: str | None = None) -> Job:
    """A job of the drawn facts with everything that ships; ``text``: in place of the text."""
    model = scene_.model
    given: list[Row] = [
        {k: row[k] for k in ("prompt", "subject", "target")} for row in scene_.drawn.forget
    ]
    facts = read_facts(given)
    settings = Settings((), seed=args.seed)
    tokens = 4096 if args.quick else settings.text_tokens
    pieces = windows(model.tokenizer, text or reference_text(None), settings.window, tokens)
    coded = encode_facts(model.tokenizer, facts)
    cache = args.cache or Path(tempfile.mkdtemp(prefix="patcher-bench-"))
    return Job(
        model, facts, coded, settings, pieces, without(facts, shipped_probes()), cache, Silent()
    )


def effect(scene_: Scene, job: Job, deltas: Deltas) -> dict[str, Any]:
    """What an edit does to the facts, to others, and to running text.

    ``kept``: share of the others that are still answered. ``moved``: nats by which the
    log-probability of the others' answers moves, on average: finer than a share.
    """
    model = scene_.model
    nats = math.log(scene_.base.perplexity)
    with folded(model, as_edit(deltas)):
        still = answered(model, [(fact.prompt, fact.answer) for fact in job.encoded])
        wordings = answered(model, scene_.paraphrases)
        after = judge(model, [pair for pair, _ in scene_.stay])
        rise = mean_nats(model, scene_.base.windows) - nats
    each = [
        (w * a.answered, w * abs(sum(a.nats) - b))
        for (_, w), a, b in zip(scene_.stay, after, scene_.before, strict=True)
    ]
    return {
        "answered": f"{sum(still)}/{len(still)}",
        "paraphrases": f"{sum(wordings)}/{len(wordings)}",
        "kept": round(sum(kept for kept, _ in each), 4),
        "moved": round(sum(moved for _, moved in each), 5),
        "perplexity": round(math.exp(rise), 5),
    }


def aligned(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table for people."""
    names = list(rows[0])
    cells = [names] + [[_cell(row[name]) for name in names] for row in rows]
    wide = [max(len(row[i]) for row in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, wide, strict=True)) for row in cells)


def _cell(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"{value[0]}-{value[-1]}" if len(value) > 1 else str(value[0])
    return str(value)
