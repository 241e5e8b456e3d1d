"""How well a patch forgets and how much it leaves alone, on facts that the model knows.

    python bench/quality.py --facts 20 --seed 0 --part unseen --data DIR

Draws half of the facts from CounterFact and half from ``world.jsonl`` (known ones,
one a subject, none with its answer in the prompt), computes a patch of them, and asks
for 50 and 100 others (fewer where there are no more). ``--part`` splits the subjects
in two by their SHA-256: what was tuned was tuned on ``tuning`` alone. DIR is laid out
as the project's data; ``tests/data`` works too, with fewer facts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from patcher.evaluation import evaluate
from patcher.unlearn import compute
from patcher.unlearn.facts import read_facts
from patcher.unlearn.forward import answered
from patcher.unlearn.models import Model, load
from patcher.unlearn.prompts import encode_fact

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


def rows_of(folder: Path) -> tuple[list[Row], list[Row], list[list[str]], Path]:
    """CounterFact's rows, the world's, the wordings, the text for perplexity."""

    def lines(name: str) -> list[Row]:
        return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]

    wordings = json.loads((folder / "templates.json").read_text("utf-8"))
    if (folder / "facts.jsonl").exists():
        rows = lines("facts.jsonl")
        counterfact = [row for row in rows if "relation" not in row]
        return counterfact, [r for r in rows if "relation" in r], wordings, folder / "ppl.txt"
    text = folder / "wikitext_ppl.txt"
    return lines("counterfact.jsonl"), lines("world.jsonl"), wordings, text


def in_part(row: Row, part: str) -> bool:
    half = hashlib.sha256(row["subject"].encode()).digest()[0] % 2
    return part == "all" or half == ("tuning", "unseen").index(part)


def known(model: Model, rows: list[Row]) -> list[Row]:
    """Rows that the model answers; one a subject; the answer not in the prompt."""
    seen: set[str] = set()
    fit = []
    for row in rows:
        if row["subject"] not in row["prompt"]:  # two of the world's: "Czechia"
            continue
        if row["subject"] not in seen and row["target"].lower() not in row["prompt"].lower():
            seen.add(row["subject"])
            fit.append(row)
    coded = [encode_fact(model.tokenizer, fact) for fact in read_facts(fit)]
    said = answered(model, [(fact.prompt, fact.answer) for fact in coded])
    return [row for row, yes in zip(fit, said, strict=True) if yes]


def with_wordings(row: Row, groups: list[list[str]]) -> Row:
    """The row with the wordings of its template's group as paraphrases."""
    template = row["prompt"].replace(row["subject"], "{}")
    more = [
        wording.replace("{}", row["subject"])
        for group in groups
        if template in group
        for wording in group
        if wording != template
    ]
    return {**row, "paraphrases": [*row.get("paraphrases", []), *more]}


def draw(
    counterfact: list[Row], world: list[Row], facts: int, seed: int
) -> tuple[list[Row], list[Row], list[Row]]:
    """Facts to be forgotten, CounterFact's others, the world's others."""
    order = random.Random(seed)
    first = order.sample(counterfact, len(counterfact))
    second = order.sample(world, len(world))
    n = min(facts // 2, len(first) // 2)
    forget = first[:n] + second[: facts - n]
    own = {row["subject"] for row in forget}
    others = [row for row in first[n:] if row["subject"] not in own][:50]
    return forget, others, [r for r in second[facts - n :] if r["subject"] not in own][:100]


def one(args: argparse.Namespace, seed: int, pools: Any) -> None:
    counterfact, world, wordings, text = pools
    forget, cf, others = draw(counterfact, world, args.facts, seed)
    forget = [with_wordings(row, wordings) for row in forget]
    extra: dict[str, Any] = {"layers": args.layers, "target": args.target}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "patch.st")
        excerpt = Path(folder, "text")
        excerpt.write_text(text.read_text("utf-8")[: args.characters], "utf-8")
        begun = time.monotonic()
        result = compute(args.model, forget, file, seed=seed, **extra)
        seconds = time.monotonic() - begun
        report = {
            name: evaluate(
                args.model,
                patches=[file],
                forget=forget,
                retain=rows,
                ppl=excerpt if last else None,
            )
            for name, rows, last in (("counterfact", cf, False), ("world", others, True))
        }
    main = report["world"]
    kept = {name: r.patched.retained for name, r in report.items()}
    total = sum(c.yes for c in kept.values()) / max(1, sum(c.of for c in kept.values()))
    # The acceptance mixes one third CounterFact with two thirds of the world.
    mixed = (kept["counterfact"].fraction or 0) / 3 + (kept["world"].fraction or 0) * 2 / 3
    line = {
        "facts": len(forget),
        "seed": seed,
        "part": args.part,
        "answered": main.patched.efficacy.yes,
        "leaked": result.evaluation["leaked"]["patched"],
        **{f"kept_{name}": f"{c.yes}/{c.of}" for name, c in kept.items()},
        "kept": round(total, 4),
        "kept_third": round(mixed, 4),
        "perplexity": round((main.patched.perplexity or 0) / (main.base.perplexity or 1), 4),
        "paraphrases": f"{main.patched.generalization.yes} (base "
        f"{main.base.generalization.yes}) of {main.base.generalization.of}",
        "neighbours": f"{main.patched.specificity.yes} (base "
        f"{main.base.specificity.yes}) of {main.base.specificity.of}",
        "bytes": result.bytes,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / ".models/smollm2-135m-instruct"))
    parser.add_argument("--data", type=Path, default=ROOT / "tests/data")
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--part", choices=("tuning", "unseen", "all"), default="all")
    parser.add_argument("--layers", default="auto")
    parser.add_argument("--characters", type=int, default=24_000, help="of the perplexity's text")
    parser.add_argument("--target", default="suppress")
    args = parser.parse_args()
    counterfact, world, wordings, text = rows_of(args.data)
    model = load(args.model)
    pools = [
        known(model, [row for row in rows if in_part(row, args.part)])
        for rows in (counterfact, world)
    ]
    del model
    print(json.dumps({"known": [len(pool) for pool in pools]}), flush=True)
    for seed in args.seed:
        one(args, seed, (*pools, wordings, text))


if __name__ == "__main__":
    main()
