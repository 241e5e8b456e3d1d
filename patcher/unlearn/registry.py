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
    in ``methods/``, as ``module:name``.
    """

    name: str
    summary: str
    source: str
    cost: str
    needs: str
    kind: str
    place: str

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
