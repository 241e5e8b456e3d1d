"""Which layer's edit does what: each edited module alone, the others as in the base."""

from __future__ import annotations

from typing import Any

from ...unlearn.forward import folded
from ..asking import judge
from ..intervals import of_facts
from .setting import CanNotAskError, Probe, Setting

Alone = dict[str, tuple[list[bool], list[bool]]]  # module -> facts answered, others kept


def _ready(setting: Setting) -> None:
    if not setting.edits:
        raise CanNotAskError("there is no patch")


def _look(setting: Setting) -> Alone:
    found: Alone = {}
    pairs = [asked.pair for asked in (*setting.facts, *setting.stay)]
    for name in dict.fromkeys(name for edit in setting.edits for name in edit):
        with folded(setting.model, *({name: e[name]} for e in setting.edits if name in e)):
            said = [one.answered for one in judge(setting.model, pairs)]
        found[name] = said[: len(setting.facts)], said[len(setting.facts) :]
    return found


def _tell(setting: Setting, found: Alone, nothing: None) -> dict[str, Any]:
    return {
        "alone": {
            name: {
                "efficacy": of_facts(facts, setting.seed).as_dict(),
                "retained": of_facts(others, setting.seed).as_dict(),
            }
            for name, (facts, others) in found.items()
        }
    }


LAYERS = Probe(_ready, _look, _tell, once=True)
