"""The ledger as a value: whether its chain holds, and what it tells. No I/O.

Entries are :class:`~patcher.protocol.LedgerEntry` as ``GET ledger`` and an exported JSON Lines
file have them. How each hash is made is in ``docs/protocol.md``, "Ledger". What a chain alone
can't show, a tail that was cut off or a history rewritten from some entry on, a head that was
kept elsewhere shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from patcher.errors import AmbiguousIdError, UnknownPatchError, UsageError, VerificationError
from patcher.moments import moment
from patcher.protocol import LedgerEntry, weight_version

GENESIS = "0" * 64  # what the first entry follows
FIELDS = {"seq": int, "time": str, "event": str, "detail": dict, "previous": str, "hash": str}


def detail_text(detail: Mapping[str, Any]) -> str:
    """The text of an entry's detail that its hash covers.

    Raises ValueError for a number that isn't finite, which JSON lacks.
    """
    return json.dumps(detail, sort_keys=True, separators=(",", ":"), allow_nan=False)


def chain(previous: str, seq: int, time: str, event: str, detail: str) -> str:
    """The hash of an entry: sha256 over its predecessor's hash and its own fields.

    ``detail`` is its :func:`detail_text`.
    """
    entry = json.dumps([previous, seq, time, event, detail], separators=(",", ":"))
    return hashlib.sha256(entry.encode()).hexdigest()


@dataclass(frozen=True)
class Head:
    """The last entry of a ledger, or of a part: kept elsewhere it proves all up to there."""

    seq: int = 0
    hash: str = GENESIS
    time: str | None = None

    def __str__(self) -> str:
        return f"{self.hash}:{self.seq}"

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"seq": self.seq, "hash": self.hash, "time": self.time}


@dataclass(frozen=True)
class Fault:
    """What is wrong, and at which entry (0: with the whole)."""

    entry: int
    what: str

    def __str__(self) -> str:
        return f"entry {self.entry}: {self.what}" if self.entry else self.what


def head_of(entries: Sequence[LedgerEntry]) -> Head:
    """The last entry's."""
    if not entries:
        return Head()
    last = entries[-1]
    return Head(last["seq"], last["hash"], last["time"])


def misshapen(entry: Any) -> str:
    """Why this is no entry; nothing where it is one. A field more would be one without proof."""
    if not isinstance(entry, dict):
        return "it is no JSON object"
    if wrong := sorted(str(name) for name in FIELDS.keys() ^ entry.keys()):
        return f"it has other fields than an entry: {', '.join(wrong)[:200]}"
    wrong = [name for name, kind in FIELDS.items() if type(entry[name]) is not kind]
    return f"not of their type: {', '.join(wrong)}" if wrong else ""


def verify_chain(entries: Iterable[Any], after: Head = Head()) -> list[Fault]:
    """Recompute every hash, and check numbers and links, from the entry that follows ``after``.

    Returns what is wrong, in the entries' order; nothing where the chain holds.
    """
    faults: list[Fault] = []
    last = after
    for entry in entries:
        if wrong := misshapen(entry):
            faults.append(Fault(last.seq + 1, wrong))
            continue
        faults += [Fault(last.seq + 1, wrong) for wrong in _broken(entry, last)]
        last = Head(entry["seq"], entry["hash"], entry["time"])
    return faults


def _broken(entry: LedgerEntry, last: Head) -> list[str]:
    wrong = []
    if entry["seq"] != last.seq + 1:
        wrong.append(f"number {entry['seq']} follows number {last.seq}")
    if entry["previous"] != last.hash:
        wrong.append("it does not follow the entry before it")
    if _hash(entry) != entry["hash"]:
        wrong.append("its hash is not that of its content")
    return wrong


def _hash(entry: LedgerEntry) -> str:
    try:
        text = detail_text(entry["detail"])
    except (ValueError, RecursionError):
        return ""  # no JSON: nothing that was ever hashed
    return chain(entry["previous"], entry["seq"], entry["time"], entry["event"], text)


def missing_head(entries: Iterable[Any], digest: str, seq: int | None = None) -> list[Fault]:
    """What is wrong where an earlier head, with its number where that is known, isn't there."""
    hashes = {e["seq"]: e["hash"] for e in entries if not misshapen(e)} | {0: GENESIS}
    if seq is None:
        known = digest in hashes.values()
        return [] if known else [Fault(0, f"no entry has the earlier head's hash, {digest}")]
    if seq > max(hashes):
        return [Fault(seq, f"missing: the ledger ends at entry {max(hashes)}; it was cut off")]
    if hashes.get(seq) == digest:
        return []
    return [Fault(seq, "another hash than the earlier head: this or an entry before was rewritten")]


# -- what was in force -------------------------------------------------------------------------

# Entries after which nothing of the committed stack is in force, and what each says is held.
_LEFT_OUT = ("start-without-restore", "start-disabled", "detach")
_PUT_BACK = ("start-restored", "repair-restored", "detach-restored")
Ids = tuple[str, ...]


@dataclass(frozen=True)
class State:
    """What a ledger tells of the stack after some entry, and at which it came to be in force."""

    committed: Ids = ()
    suspended: bool = False
    since: int = 0

    @property
    def in_force(self) -> Ids:
        """The ids that the engine must serve, the bottom first."""
        return () if self.suspended else self.committed


def replay(entries: Iterable[LedgerEntry]) -> tuple[list[State], list[Fault]]:
    """The state after each entry, and where entries contradict those before them.

    A failed, refused or interrupted change, drift and what put it right, uploads, tokens and
    confirmations leave the stack as it was.
    """
    states, faults, state = [], [], State()
    for entry in entries:
        state, wrong = _step(state, entry)
        states.append(state)
        if wrong:
            faults.append(Fault(entry["seq"], wrong))
    return states, faults


def _step(state: State, entry: LedgerEntry) -> tuple[State, str]:
    event, detail = entry["event"], entry["detail"]
    committed, suspended, wrong = state.committed, state.suspended, ""
    if event in ("change-intent", "change-done"):
        wrong = _contradiction(detail, "before", state.in_force)
        if event == "change-done":
            after = _ids(detail.get("after"))
            if after is None:
                return state, "a change that doesn't say to which stack"
            committed, suspended = after, False
    elif event == "start":
        wrong = _contradiction(detail, "stack", committed)
        suspended = False
    elif event in _LEFT_OUT:
        wrong = _contradiction(detail, "held", committed)
        suspended = True
    elif event in _PUT_BACK:
        wrong = _contradiction(detail, "stack", state.in_force)
    new = State(committed, suspended, state.since)
    changed = new.in_force != state.in_force
    return (State(committed, suspended, entry["seq"]) if changed else new), wrong


def _contradiction(detail: Mapping[str, Any], field: str, known: Ids) -> str:
    told = _ids(detail.get(field, list(known)))
    return "" if told == known else f"`{field}` is not the stack that the entries before give"


def _ids(value: Any) -> Ids | None:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return None
    return tuple(value)


def disagreement(states: Sequence[State], served: Sequence[str], known: int) -> list[Fault]:
    """What is wrong where an engine's stack is none of those that its ledger gives.

    ``served`` was asked for after ``known`` entries were there and before the last one was:
    a change may have come between.
    """
    possible = [state.in_force for state in [State(), *states][known:]]
    if tuple(served) in possible:
        return []
    told = weight_version(possible[-1])
    return [Fault(0, f"the engine's stack is not the ledger's (weight version {told[:16]})")]


@dataclass(frozen=True)
class At:
    """What was in force at a time. ``entry``: number of the entry that made it so (0: none).

    ``suspended``: the base, by a start without restore. ``ambiguous``: the engine's clock was set
    back over that time, and more than one stack was in force at it.
    """

    stack: Ids
    suspended: bool
    entry: int
    ambiguous: bool


def stack_at(entries: Sequence[LedgerEntry], time: datetime) -> At:
    """The stack that was in force at ``time``, from a whole ledger's entries alone.

    Raises :class:`~patcher.errors.VerificationError` where entries contradict each other or
    their times are none.
    """
    states, faults = replay(entries)
    if faults:
        raise VerificationError(f"The ledger contradicts itself: {faults[0]}.")
    later = [_time(entry) > time for entry in entries]
    last = max((at for at, is_later in enumerate(later) if not is_later), default=-1)
    first = min((at for at, is_later in enumerate(later) if is_later), default=len(later))
    all_states = [State(), *states]
    stacks = {state.in_force for state in all_states[min(first, last + 1) : last + 2]}
    state = all_states[last + 1]
    return At(state.in_force, state.suspended, state.since, len(stacks) > 1)


def _time(entry: LedgerEntry) -> datetime:
    try:
        return moment(entry["time"])
    except UsageError as error:
        raise VerificationError(
            f"Entry {entry['seq']} of the ledger has no time: {error.message}"
        ) from None


def put_on(entries: Sequence[LedgerEntry], patch_id: str) -> LedgerEntry | None:
    """The change that put a patch on last, or None."""
    for entry in reversed(entries):
        if entry["event"] == "change-done" and patch_id in _difference(entry["detail"]):
            return entry if patch_id in entry["detail"].get("after", ()) else None
    return None


def in_force_since(entries: Sequence[LedgerEntry], patch_id: str) -> LedgerEntry | None:
    """The entry from which on a patch has been in force without a break, or None."""
    found = None
    for entry, state in zip(entries, replay(entries)[0], strict=True):
        if patch_id not in state.in_force:
            found = None
        elif found is None:
            found = entry
    return found


# -- which entries -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Filter:
    """Which entries are wanted: of all that is given, each must hold.

    ``events``: names, or their beginnings up to a hyphen (``change``). ``patch``: a whole id.
    ``since`` (included) and ``until`` (not included): times.
    """

    events: tuple[str, ...] = ()
    patch: str = ""
    since: datetime | None = None
    until: datetime | None = None

    def __call__(self, entry: LedgerEntry) -> bool:
        """Whether ``entry`` is wanted."""
        event = entry["event"]
        if self.events and not any(f"{event}-".startswith(f"{one}-") for one in self.events):
            return False
        if self.patch and self.patch not in concerned(entry):
            return False
        if self.since and _time(entry) < self.since:
            return False
        return not (self.until and _time(entry) >= self.until)


def concerned(entry: LedgerEntry) -> set[str]:
    """The patches that an entry is about: of a change those that it puts on or takes off."""
    detail = entry["detail"]
    lists = (_ids(detail.get(name)) or () for name in ("patches", "stack", "held"))
    one = detail.get("patch")
    found = {i for ids in lists for i in ids} | ({one} if isinstance(one, str) else set())
    return found | _difference(detail)


def _difference(detail: Mapping[str, Any]) -> set[str]:
    before, after = _ids(detail.get("before")), _ids(detail.get("after"))
    return set(before or ()) ^ set(after or ())


def named(entries: Iterable[LedgerEntry], prefix: str) -> str:
    """The whole id of the patch that a shortened one means in these entries.

    Raises :class:`~patcher.errors.UnknownPatchError` and
    :class:`~patcher.errors.AmbiguousIdError`.
    """
    prefix = prefix.strip().lower()
    found = {i for entry in entries for i in concerned(entry) if i.startswith(prefix)}
    if len(prefix) < 4 or not found:
        raise UnknownPatchError(
            f"No entry is about a patch {prefix[:64]}.",
            "An id is 64 hexadecimal digits, or its first four or more.",
        )
    if len(found) > 1:
        names = ", ".join(sorted(one[: len(prefix) + 8] for one in found))
        raise AmbiguousIdError(f"{prefix} could be any of {names}.", "Write more of the id.")
    return found.pop()
