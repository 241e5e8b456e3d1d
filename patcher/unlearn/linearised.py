"""What wishes come to under an edit, linearised anew only where the edit has moved them.

A pass forward and back for every wish in every step is most of what computing takes. From the
fourth step on most wishes hardly move: of 159 wishes of 50 facts nine tenths are then foretold to
0.07 nats by their slopes of the step before (docs/methods.md, "Target values"). So each wish is
looked at when it is new or has moved, and foretold in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .gate import Gate
from .models import Model
from .slopes import Slopes, Values, Wish, joined, of_wishes, start

#: Nats by which a wish's tokens may have moved, each by its slope and without regard to sign,
#: since it was looked at: those that cancel each other move what isn't linear, too.
STALE = 0.5
#: And of what the edit writes at them, the part that may be another: where a slope is next to
#: nothing it foretells no movement, however far the edit goes.
OTHER = 0.5


class Linearised:
    """Wishes, each as it was when it was last looked at. ``slopes``: by layer, of then."""

    def __init__(self, model: Model, gates: dict[int, Gate]) -> None:
        self._model = model
        self._gates = gates
        self._wishes: list[Wish] = []
        self._excess = torch.zeros(0, dtype=torch.float64)  # of then; NaN: not looked at yet
        self._wrote: dict[int, torch.Tensor] = {}  # layer -> [tokens, d_out], E times gates of then
        self.slopes: dict[int, Slopes] = {}

    def start(self) -> Values:
        """The values of an edit that does nothing."""
        return start(self._model, self._gates)

    def look(self, wishes: Sequence[Wish], values: Values) -> torch.Tensor:
        """By how many nats each wish is missed ``[wishes]`` float64 (negative: met).

        ``slopes`` are of these wishes afterwards. Those whose place the call before had, too, need
        no new look for another goal.
        """
        self._take(wishes)
        moved, stale = self._moved(values)
        stale |= self._excess.isnan()
        if bool(stale.any()):
            self._renew(stale, values)
            moved[stale] = 0.0
        return self._excess + moved

    def _take(self, wishes: Sequence[Wish]) -> None:
        """Make these the wishes, with what is known of them."""
        before = {(wish.place, wish.rise): i for i, wish in enumerate(self._wishes)}
        count = len(self._wishes)
        new = torch.full((count,), -1)
        excess = torch.full((len(wishes),), torch.nan, dtype=torch.float64)
        for i, wish in enumerate(wishes):
            old = before.pop((wish.place, wish.rise), None)
            if old is not None:
                new[old] = i
                further = self._wishes[old].goal - wish.goal
                excess[i] = self._excess[old] + (-further if wish.rise else further)
        self._wishes, self._excess = list(wishes), excess
        if not torch.equal(new, torch.arange(count)):
            self._keep(new)

    def _keep(self, new: torch.Tensor) -> None:
        """Number the slopes' rows anew; those that become -1 are dropped."""
        for layer, part in self.slopes.items():
            rows = new[part.row]
            on = rows >= 0
            there = on.to(part.outputs.device)
            self.slopes[layer] = Slopes(part.outputs[there], part.gates[there], rows[on])
            self._wrote[layer] = self._wrote[layer][there]

    def _moved(self, values: Values) -> tuple[torch.Tensor, torch.Tensor]:
        """How far each wish has moved by its slopes, in nats, and whether that is too far."""
        moved, in_all, other, whole = torch.zeros(4, len(self._excess), dtype=torch.float64)
        for layer, part in self.slopes.items():
            then = self._wrote[layer]
            change = part.gates @ values[layer].T - then
            by_token = (part.outputs * change).sum(1)
            for total, each in (
                (moved, by_token),
                (in_all, by_token.abs()),
                (other, change.square().sum(1)),
                (whole, then.square().sum(1)),
            ):
                total.index_add_(0, part.row, each.double().cpu())
        return moved, (in_all > STALE) | (other > OTHER**2 * whole)

    def _renew(self, stale: torch.Tensor, values: Values) -> None:
        """Look at the ``stale`` ones."""
        chosen = stale.nonzero()[:, 0]
        own = [self._wishes[i] for i in chosen.tolist()]
        kept = torch.arange(len(stale))
        kept[stale] = -1
        self._keep(kept)  # before: old and new slopes of all wishes would not lie in memory at once
        self._excess[stale] = torch.nan
        self._excess[stale], slopes = of_wishes(self._model, self._gates, own, values)
        for layer, part in slopes.items():
            wrote = part.gates @ values[layer].T
            part = part._replace(row=chosen[part.row])
            old = self.slopes.get(layer)
            self.slopes[layer] = joined([old, part]) if old else part
            self._wrote[layer] = torch.cat([self._wrote[layer], wrote]) if old else wrote
