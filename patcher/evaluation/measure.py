"""``patcher.evaluate``: a model's figures without and with patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..patch import Patch
from ..unlearn.choosing import check_seed, choose
from ..unlearn.facts import Source, read_facts
from ..unlearn.forward import Edit, answered, folded
from ..unlearn.models import Model, load
from ..unlearn.progress import Progress, Silent
from ..unlearn.prompts import encode_facts
from ..unlearn.reference import read_text
from ..unlearn.stacking import edit_of, served_in
from . import general
from .intervals import Outcome, share
from .probes import Asked, Setting, askable, choose_probes, looked, told
from .questions import Outcomes, questions
from .readers import format_of, opened
from .report import Count, EvaluationReport


def evaluate(
    model: str | Path,
    *,
    patches: Sequence[str | Path | Patch] = (),
    forget: Source,
    retain: Source | None = None,
    ppl: str | Path | None = None,
    known_only: bool = False,
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
    format: str = "auto",  # noqa: A002 - the command's word
    retain_format: str = "auto",
    probes: str | Sequence[str] = "none",
    lm_eval: Sequence[str] = (),
    seed: int = 0,
) -> EvaluationReport:
    """Measure a model without and with patches, on weights rounded to the served dtype.

    >>> import patcher
    >>> report = patcher.evaluate("my-model", patches=["forget.st"], forget="forget.jsonl")
    >>> report.base.efficacy.of == report.patched.efficacy.of == report.facts
    True

    Args:
        model: a directory or a hub id.
        patches: files or patches, the bottom of the stack first; may be empty.
        forget: the facts to be forgotten, a file or rows.
        retain: facts that are to stay; those that the base knows are counted.
        ppl: a text file that perplexity is measured on.
        known_only: count only facts that the base knows.
        limit: how many facts at most; with ``known_only``, how many known ones.
        dtype: what the weights are served in; ``auto``: what the patches are for, and without
            any the checkpoint's.
        device: ``auto``, ``cpu``, ``cuda`` …
        progress: told what is done.
        format: of the file of facts to be forgotten (docs/evaluation.md, "Formats").
        retain_format: of the file of those that are to stay.
        probes: further figures: ``all``, ``none``, or names (docs/evaluation.md).
        lm_eval: tasks of the package ``lm_eval`` to run on both sets of weights.
        seed: of resamples, samples and splits.

    Raises:
        BaseMismatchError: a patch was computed on other weights.
        InvalidPatchError: a patch file is damaged.
        ForgetSetError: a set of facts is wrong, empty or of an unknown format.
        InputError: the text can't be used.
        ModelError: the model can't be used, or gives logits that are not finite.
        UsageError: an unknown probe, format or task, a seed that is off, a named probe that
            can't be asked here, or ``lm_eval`` is not installed.
    """
    teller = progress or Silent()
    check_seed(seed, least=0)
    wanted, named = choose_probes(probes)
    tasks = general.checked(lm_eval)
    stack = [patch if isinstance(patch, Patch) else Patch.read(patch) for patch in patches]
    source, rows = opened(forget, format)
    facts = read_facts(source, None if known_only else limit, located=False)
    kept_source, kept_rows = opened(retain, retain_format) if retain is not None else ((), {})
    stay = read_facts(kept_source, located=False) if retain is not None else []
    text = None if ppl is None else read_text(ppl)
    teller.start("Loading the model", None)
    loaded = load(model, served_in(stack) if dtype == "auto" else dtype, device)
    teller.finish()
    edits = [edit_of(loaded, patch) for patch in stack]
    chosen = choose(loaded, facts, known_only, limit, teller)
    asked = [
        Asked(fact, ids, rows.get(fact.line, {}))
        for fact, ids in zip(chosen.facts, chosen.encoded, strict=True)
    ]
    others = [
        Asked(fact, ids, kept_rows.get(fact.line, {}))
        for fact, ids in zip(
            stay, encode_facts(loaded.tokenizer, stay, loaded.max_tokens), strict=True
        )
    ]
    said = answered(loaded, [other.pair for other in others])
    known = [other for other, yes in zip(others, said, strict=True) if yes]
    setting = Setting(loaded, asked, others, known, _layers(loaded, stack), seed, edits)
    ready, skipped = askable(setting, wanted, named)
    usual = questions(loaded, asked, known, text)

    teller.start("Measuring", 2)
    base, before = usual.ask(loaded)
    teller.step(1)
    with _edited(loaded, edits) as changed:
        patched, after = usual.ask(loaded) if edits else (base, before)
        teller.step(2)
        teller.finish()
        found = looked(setting, ready, teller, base=not edits)
        general_patched = general.run(loaded, tasks) if tasks else None
    plain = looked(setting, ready, teller, base=True) if edits else found
    general_base = general.run(loaded, tasks) if tasks and edits else general_patched
    return EvaluationReport(
        chosen.looked_at,
        chosen.known_of_them,
        base,
        patched,
        Count(base.retained.of, len(stay)),
        usual.perplexity_on,
        tuple(patch.id for patch in stack),
        loaded.dtype_name,
        intervals={"base": _intervals(before, seed), "patched": _intervals(after, seed)},
        groups=_groups(setting, before, after),
        probes=told(setting, ready, plain, found),
        skipped=skipped,
        changed=changed,
        lm_eval=None if not tasks else {"base": general_base, "patched": general_patched},
        format=_format(forget, format),
        each={"base": _each(before), "patched": _each(after)},
        texts=tuple(one.fact.text for one in asked),
        targets=tuple(one.fact.target for one in asked),
        replies={"base": plain["says"], "patched": found["says"]} if "says" in ready else {},
    )


def _layers(model: Model, stack: Sequence[Patch]) -> tuple[int, ...]:
    names = {name for patch in stack for name in patch.deltas}
    return tuple(layer for layer in range(model.layers) if model.module_name(layer) in names)


@contextmanager
def _edited(model: Model, edits: Sequence[Edit]) -> Iterator[dict[str, dict[str, float]]]:
    """The model with the edits folded in; gives how far each module moved.

    Frobenius norms, of the rounded weights: ``delta`` of W' - W, ``weight`` of W.
    """
    names = dict.fromkeys(name for edit in edits for name in edit)
    before = {name: model.weight(name).clone() for name in names}
    with folded(model, *edits):
        yield {
            name: {
                "delta": float(torch.linalg.norm(model.weight(name) - weight)),
                "weight": float(torch.linalg.norm(weight)),
            }
            for name, weight in before.items()
        }


def _intervals(outcomes: Outcomes, seed: int) -> dict[str, dict[str, Any] | None]:
    found = {name: share(one, seed).as_dict() for name, one in outcomes.items()}
    return {name: one["interval"] for name, one in found.items()}


def _each(outcomes: Outcomes) -> dict[str, Sequence[Outcome]]:
    return {name: outcomes[name] for name in ("efficacy", "generalization", "specificity")}


def _groups(setting: Setting, before: Outcomes, after: Outcomes) -> dict[str, Any]:
    """Efficacy and retained by the rows' ``group`` or ``relation``, where they have one."""
    result: dict[str, Any] = {}
    for figure, asked in (("efficacy", setting.facts), ("retained", setting.stay)):
        names = [_group(one.row) for one in asked]
        result[figure] = {
            name: {
                side: share(
                    [o for o, n in zip(outcomes[figure], names, strict=True) if n == name],
                    setting.seed,
                ).as_dict()
                for side, outcomes in (("base", before), ("patched", after))
            }
            for name in sorted({name for name in names if name is not None})
        }
    return result


def _group(row: Mapping[str, Any]) -> str | None:
    found = row.get("group") or row.get("relation")
    return found if isinstance(found, str) else None


def _format(forget: Source, wish: str) -> str:
    return format_of(forget, wish) if isinstance(forget, str | Path) else "jsonl"
