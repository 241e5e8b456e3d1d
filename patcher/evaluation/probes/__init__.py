"""Figures beside the usual four, each asked before and after (docs/evaluation.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UsageError
from ...unlearn.progress import Progress
from . import attacks, generated, kin, layers, lens, likelihood, quantise, relearn, truth
from .setting import Asked, CanNotAskError, Probe, Setting

__all__ = ["PROBES", "Asked", "Probe", "Setting", "askable", "choose_probes", "looked", "told"]

#: In the order of the report; what changes the weights meanwhile comes last.
PROBES: Mapping[str, Probe] = {
    "probability": likelihood.PROBABILITY,
    "rank": likelihood.RANK,
    "templates": attacks.TEMPLATE_ATTACK,
    "prefixes": attacks.PREFIX_ATTACK,
    "chat": generated.CHAT,
    "sampling": generated.SAMPLING,
    "says": generated.SAYS,
    "multihop": attacks.MULTIHOP,
    "truth": truth.TRUTH,
    "lens": lens.LENS,
    "layers": layers.LAYERS,
    "same_relation": kin.SAME_RELATION,
    "same_subject": kin.SAME_SUBJECT,
    "quantise": quantise.QUANTISE,
    "relearn": relearn.RELEARN,
}


def choose_probes(wish: str | Sequence[str]) -> tuple[dict[str, Probe], bool]:
    """The probes of ``all``, ``none`` or names; and whether each was named.

    Raises:
        UsageError: an unknown name.
    """
    names = [name.strip() for name in wish.split(",")] if isinstance(wish, str) else list(wish)
    if names in (["none"], [""], []):
        return {}, False
    if names == ["all"]:
        return dict(PROBES), False
    for name in names:
        if name not in PROBES:
            raise UsageError(
                f"Unknown probe {name!r}.", f"Choose all, none, or of {', '.join(PROBES)}."
            )
    return {name: PROBES[name] for name in PROBES if name in names}, True


def askable(
    setting: Setting, probes: Mapping[str, Probe], named: bool
) -> tuple[dict[str, Probe], dict[str, str]]:
    """Those that can be asked here; and of the others, why not.

    Raises:
        UsageError: one that was named can't.
    """
    ready: dict[str, Probe] = {}
    why: dict[str, str] = {}
    for name, probe in probes.items():
        try:
            probe.ready(setting)
        except CanNotAskError as error:
            if named:
                raise UsageError(
                    f"The probe {name} can't be asked: {error}.", "Leave it out, or ask for all."
                ) from None
            why[name] = str(error)
        else:
            ready[name] = probe
    return ready, why


def looked(
    setting: Setting, probes: Mapping[str, Probe], progress: Progress, *, base: bool
) -> dict[str, Any]:
    """What each probe finds on the weights as they are now; None for what the base alone is asked.

    ``base``: whether they are the base's.
    """
    found: dict[str, Any] = {}
    if probes:
        progress.start("Probing the base" if base else "Probing the patched", len(probes))
        for number, (name, probe) in enumerate(probes.items(), 1):
            found[name] = probe.look(setting) if base or not probe.once else None
            progress.step(number, name)
        progress.finish()
    return found


def told(
    setting: Setting,
    probes: Mapping[str, Probe],
    base: Mapping[str, Any],
    patched: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Each probe's document."""
    return {name: probe.tell(setting, base[name], patched[name]) for name, probe in probes.items()}
