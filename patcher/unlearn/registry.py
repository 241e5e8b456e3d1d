"""The methods by name, as ``patcher methods`` lists them; loading one imports torch.

A method turns a :class:`~patcher.unlearn.job.Job` into deltas; all else is shared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from .job import Method


@dataclass(frozen=True)
class Entry:
    """What there is to say of a method.

    ``kind``: of the deltas, ``multiplicative`` or ``additive``. ``place``: the function
    in ``methods/``, as ``module:name``. ``repeats``: whether it heeds what a later attempt
    asks for where a bar is missed (:mod:`patcher.unlearn.attempts`).
    """

    name: str
    summary: str
    source: str
    cost: str
    needs: str
    kind: str
    place: str
    repeats: bool = False

    def load(self) -> Method:
        """The function itself."""
        module, _, name = self.place.partition(":")
        found: Method = getattr(import_module(f"{__package__}.methods.{module}"), name)
        return found

    def as_dict(self) -> dict[str, Any]:
        """As ``patcher methods --json`` writes it."""
        return {k: v for k, v in asdict(self).items() if k != "place"}


_ENTRIES = (
    Entry(
        "zero",
        "closed-form gates, the least values that make the model stop answering",
        "ZeroUnlearn (Lin et al. 2026, arXiv 2605.18879), in a consistent form",
        "a statistics pass, then 10 to 30 forward and backward passes over the facts' prompts",
        "prompts with a subject",
        "multiplicative",
        "zero:zero",
        repeats=True,
    ),
    Entry(
        "memit",
        "one value a fact by gradient, written into several layers by least squares",
        "MEMIT (Meng et al. 2023, arXiv 2210.07229)",
        "a statistics pass, then at most 25 forward and backward passes from the edited layer up",
        "prompts with a subject",
        "additive",
        "memit:memit",
    ),
    Entry(
        "rome",
        "one value a fact by gradient, a rank-one edit a fact in one layer, one after the other",
        "ROME (Meng et al. 2022, arXiv 2202.05262)",
        "as memit",
        "prompts with a subject",
        "additive",
        "rome:rome",
    ),
    Entry(
        "alphaedit",
        "as memit, within the null space of what is preserved",
        "AlphaEdit (Fang et al. 2025, arXiv 2410.02355)",
        "as memit, and one eigendecomposition a layer",
        "prompts with a subject",
        "additive",
        "alphaedit:alphaedit",
    ),
    Entry(
        "zero-gd",
        "the gradient variant for many facts: three losses by Adam, cut to low rank",
        "ZeroUnlearn (Lin et al. 2026, arXiv 2605.18879)",
        "as memit, and 400 small steps a layer; linear in the facts",
        "prompts with a subject",
        "multiplicative",
        "gd:zero_gd",
    ),
    Entry(
        "zero-gated",
        "the gates and values of zero, the values trained on what the model says",
        "patcher (docs/methods.md)",
        "zero, then 60 forward and backward passes over 24 facts and 40 others",
        "prompts with a subject",
        "multiplicative",
        "gated:zero_gated",
    ),
    Entry(
        "ft",
        "fine-tuning to the target, low-rank",
        "cross-entropy on a LoRA-shaped delta (Hu et al. 2021, arXiv 2106.09685)",
        "up to 120 forward and backward passes over 24 prompts and 40 others",
        "prompts",
        "additive",
        "tuning:ft",
    ),
    Entry(
        "ga",
        "gradient ascent on the answers down to a bound, low-rank, with KL on what stays",
        "gradient ascent (Jang et al. 2023, arXiv 2210.01504)",
        "as ft",
        "prompts",
        "additive",
        "tuning:ga",
    ),
    Entry(
        "npo",
        "negative preference optimization, low-rank, with KL on what stays",
        "NPO (Zhang et al. 2024, arXiv 2404.05868)",
        "as ft",
        "prompts",
        "additive",
        "tuning:npo",
    ),
)
METHODS = {entry.name: entry for entry in _ENTRIES}


def method(name: str) -> Entry:
    """The method of that name.

    Raises:
        UsageError: there is none.
    """
    found = METHODS.get(name)
    if found is None:
        raise UsageError(f"Unknown method {name!r}.", f"There is {', '.join(METHODS)}.")
    return found
