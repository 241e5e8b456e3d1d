"""What the edit costs close by: other facts of the same relation, and of the same subject."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..asking import judge
from ..intervals import of_facts
from .setting import Asked, CanNotAskError, Probe, Setting

Kin = Callable[[Setting], list[Asked]]


def same_relation(setting: Setting) -> list[Asked]:
    """Facts that stay and ask what a forgotten one asks."""
    relations = {asked.relation for asked in setting.facts}
    return [asked for asked in _others(setting) if asked.relation in relations]


def same_subject(setting: Setting) -> list[Asked]:
    """Facts that stay and are about a forgotten one's subject."""
    subjects = {name.casefold() for asked in setting.facts if (name := asked.subject)}
    return [
        asked
        for asked in _others(setting)
        if (name := asked.subject) is not None and name.casefold() in subjects
    ]


def _others(setting: Setting) -> Sequence[Asked]:
    # A fact that stands in both files is not another one.
    forgotten = {(asked.fact.text, asked.fact.target) for asked in setting.facts}
    return [a for a in setting.stay if (a.fact.text, a.fact.target) not in forgotten]


def _ready(setting: Setting, kin: Kin, what: str) -> None:
    if not kin(setting):
        raise CanNotAskError(f"no known fact of the retain file has the {what} of a forgotten one")


def _look(setting: Setting, kin: Kin) -> list[bool]:
    return [one.answered for one in judge(setting.model, [a.pair for a in kin(setting)])]


def _tell(setting: Setting, base: list[bool], patched: list[bool], kin: Kin) -> dict[str, Any]:
    return {
        "base": {"kept": of_facts(base, setting.seed).as_dict()},
        "patched": {"kept": of_facts(patched, setting.seed).as_dict()},
        "relations": len({asked.relation for asked in kin(setting)}),
        "subjects": len({asked.subject for asked in kin(setting)}),
    }


def _probe(kin: Kin, what: str) -> Probe:
    return Probe(
        partial(_ready, kin=kin, what=what), partial(_look, kin=kin), partial(_tell, kin=kin)
    )


SAME_RELATION = _probe(same_relation, "relation")
SAME_SUBJECT = _probe(same_subject, "subject")
