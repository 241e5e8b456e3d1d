"""``patcher.evaluate``: a model's figures without and with patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import BaseMismatchError, InputError
from ..patch import Patch, check_module
from ..unlearn.facts import Fact, Source, read_facts
from ..unlearn.forward import Edit, answered, folded
from ..unlearn.models import Model, load
from ..unlearn.pipeline import Chosen, choose
from ..unlearn.progress import Progress, Silent
from ..unlearn.prompts import encode, encode_facts
from ..unlearn.reference import read_text
from . import perplexity as ppl_
from .report import Count, EvaluationReport, Figures

Pair = tuple[list[int], list[int]]  # ids of a prompt and of its answer


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
        dtype: what the weights are served in; ``auto``: the checkpoint's.
        device: ``auto``, ``cpu``, ``cuda`` …
        progress: told what is done.

    Raises:
        BaseMismatchError: a patch was computed on other weights.
        InvalidPatchError: a patch file is damaged.
        ForgetSetError: a set of facts is wrong or empty.
        InputError: the text can't be used.
        ModelError: the model can't be used.
    """
    teller = progress or Silent()
    opened = [patch if isinstance(patch, Patch) else Patch.read(patch) for patch in patches]
    facts = read_facts(forget, None if known_only else limit, located=False)
    stay = read_facts(retain, located=False) if retain is not None else []
    text = None if ppl is None else read_text(ppl)
    teller.start("Loading the model", None)
    loaded = load(model, dtype, device)
    teller.finish()
    edits = [_edit(loaded, patch) for patch in opened]
    chosen = choose(loaded, facts, known_only, limit, teller)
    asked = _Asked(loaded, chosen, stay, text)
    teller.start("Measuring", 2)
    base = asked.figures(loaded)
    teller.step(1)
    with folded(loaded, *edits):
        patched = asked.figures(loaded) if edits else base
    teller.step(2)
    teller.finish()
    return EvaluationReport(
        chosen.looked_at,
        chosen.known_of_them,
        base,
        patched,
        Count(base.retained.of, len(stay)),
        asked.perplexity_on,
        tuple(patch.id for patch in opened),
        loaded.dtype_name,
    )


def _edit(model: Model, patch: Patch) -> Edit:
    """The patch's deltas, once its base is seen to be this model."""
    for name, base in patch.manifest.base.modules.items():
        try:
            weight = model.served(name)
        except AttributeError:
            raise BaseMismatchError(
                f"The model has no {name}, which the patch changes.",
                "Give the model that the patch was computed on.",
            ) from None
        check_module(name, base, weight)
    return {name: delta.to_torch() for name, delta in patch.deltas.items()}


class _Asked:
    """All prompts of an evaluation, as ids, with their answers."""

    def __init__(
        self, model: Model, chosen: Chosen, stay: Sequence[Fact], text: str | None
    ) -> None:
        self.facts: list[Pair] = [(e.prompt, e.answer) for e in chosen.encoded]
        self.wordings = _wordings(model, chosen.facts)
        self.neighbours: list[Pair] = [
            encode(model.tokenizer, fact.locality, fact.locality_target)
            for fact in chosen.facts
            if fact.locality is not None and fact.locality_target is not None
        ]
        coded = encode_facts(model.tokenizer, stay, model.max_tokens)
        self.stay: list[Pair] = [(e.prompt, e.answer) for e in coded]
        said = answered(model, self.stay)
        self.stay = [pair for pair, yes in zip(self.stay, said, strict=True) if yes]
        self.windows = [] if text is None else ppl_.cut(model, text)
        if text is not None and not self.windows:
            raise InputError("The text for perplexity has one token.", "Give a longer one.")

    @property
    def perplexity_on(self) -> dict[str, int] | None:
        """Window, stride and how many tokens are judged."""
        if not self.windows:
            return None
        window = len(self.windows[0])
        judged = sum(len(piece) - 1 for piece in self.windows)
        return {"window": window, "stride": window, "tokens": judged}

    def figures(self, model: Model) -> Figures:
        """Ask the model, as it is now, all of it."""
        groups = (self.facts, self.wordings, self.neighbours, self.stay)
        said = answered(model, [pair for group in groups for pair in group])
        counts: list[Count] = []
        for group in groups:
            counts.append(Count(sum(said[: len(group)]), len(group)))
            said = said[len(group) :]
        efficacy, generalization, specificity, retained = counts
        value = ppl_.perplexity(model, self.windows) if self.windows else None
        return Figures(efficacy, generalization, specificity, retained, value)


def _wordings(model: Model, facts: Sequence[Fact]) -> list[Pair]:
    return [
        encode(model.tokenizer, wording, fact.target)
        for fact in facts
        for wording in fact.other_wordings
    ]
