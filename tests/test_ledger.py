"""The ledger as a value: what somebody did to it is seen, and what it tells is right."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patcher import ledger
from patcher.errors import AmbiguousIdError, UnknownPatchError, UsageError, VerificationError
from patcher.ledger import GENESIS, Fault, Filter, Head, State, stack_at, verify_chain
from patcher.ledger_files import csv_text, jsonl, parse
from patcher.moments import moment
from patcher.protocol import LedgerEntry
from tests.conftest import REPOSITORY

A, B, C = (f"{digit}" * 64 for digit in "abc")

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
details = st.dictionaries(st.text(max_size=6), json_values, max_size=4)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)


def chained(
    rows: list[tuple[str, dict[str, Any]]], times: list[str] | None = None
) -> list[LedgerEntry]:
    """Entries as the store appends them; the nth at minute n of an hour, unless told when."""
    entries: list[LedgerEntry] = []
    previous = GENESIS
    for seq, (event, detail) in enumerate(rows, 1):
        time = times[seq - 1] if times else at(seq)
        digest = ledger.chain(previous, seq, time, event, ledger.detail_text(detail))
        entries.append(
            {
                "seq": seq,
                "time": time,
                "event": event,
                "detail": detail,
                "previous": previous,
                "hash": digest,
            }
        )
        previous = digest
    return entries


def at(minute: int) -> str:
    return f"2026-11-24T03:{minute:02}:00.000Z"


ledgers = st.lists(st.tuples(st.text(max_size=8), details), min_size=1, max_size=6).map(chained)


# -- the chain -------------------------------------------------------------------------------------


def test_the_hash_is_what_the_protocol_says() -> None:
    """The worked example of docs/protocol.md; whoever changes this breaks every ledger."""
    detail = {"ttl": 7200.0, "actor": "admin", "reason": 'für "17"'}
    text = ledger.detail_text(detail)
    assert text == r'{"actor":"admin","reason":"f\u00fcr \"17\"","ttl":7200.0}'
    manual = (REPOSITORY / "docs" / "protocol.md").read_text(encoding="utf-8")
    covered = [GENESIS, 1, "2026-11-24T03:00:00.000Z", "change-done", text]
    assert f"\n    {json.dumps(covered, separators=(',', ':'))}\n" in manual
    assert "e094927e7ccf283733c517cddf2d288c390a3df5af1bbecee5b346ee9122480f" in manual
    # printf '["000…",1,"2026-11-24T03:00:00.000Z","change-done","{\\"actor\\":…}"]' | sha256sum
    assert ledger.chain(GENESIS, 1, "2026-11-24T03:00:00.000Z", "change-done", text) == (
        "e094927e7ccf283733c517cddf2d288c390a3df5af1bbecee5b346ee9122480f"
    )


@given(ledgers)
def test_what_was_appended_holds(entries: list[LedgerEntry]) -> None:
    assert verify_chain(entries) == []
    for seq in range(len(entries) + 1):
        head = ledger.head_of(entries[:seq])
        assert ledger.missing_head(entries, head.hash, head.seq) == []
        assert ledger.missing_head(entries, head.hash) == []
        assert verify_chain(entries[seq:], head) == []


@given(ledgers, st.data())
def test_any_change_of_any_field_is_found(entries: list[LedgerEntry], data: st.DataObject) -> None:
    touched: list[Any] = copy.deepcopy(entries)
    which = data.draw(st.integers(0, len(entries) - 1))
    field = data.draw(st.sampled_from(sorted(ledger.FIELDS)))
    new = data.draw(json_values | details | hashes)
    touched[which][field] = new
    same = json.dumps(new, sort_keys=True) == json.dumps(
        entries[which][field],  # type: ignore[literal-required]
        sort_keys=True,
    )
    assert (verify_chain(touched) == []) == same
    if not same:
        assert any(fault.entry == which + 1 for fault in verify_chain(touched))


@given(ledgers, st.data())
def test_a_dropped_entry_is_found(entries: list[LedgerEntry], data: st.DataObject) -> None:
    which = data.draw(st.integers(0, len(entries) - 1))
    left = entries[:which] + entries[which + 1 :]
    head = ledger.head_of(entries)
    found = verify_chain(left) + ledger.missing_head(left, head.hash, head.seq)
    assert found != []
    if which < len(entries) - 1:  # the chain alone can't tell of a tail that was cut off
        assert verify_chain(left)[0].entry == which + 1


@given(ledgers, st.data())
def test_swapped_entries_are_found(entries: list[LedgerEntry], data: st.DataObject) -> None:
    indices = st.integers(0, len(entries) - 1)
    one, other = data.draw(indices), data.draw(indices)
    swapped = list(entries)
    swapped[one], swapped[other] = swapped[other], swapped[one]
    assert (verify_chain(swapped) == []) == (one == other)


@given(ledgers, st.data())
def test_an_inserted_entry_is_found(entries: list[LedgerEntry], data: st.DataObject) -> None:
    where = data.draw(st.integers(0, len(entries)))
    copied = data.draw(st.sampled_from(entries))
    forged = data.draw(
        st.just(copied)
        | st.builds(lambda digest: {**copied, "seq": where + 1, "hash": digest}, hashes)
    )
    assert verify_chain([*entries[:where], forged, *entries[where:]]) != []


@given(ledgers, st.data())
def test_a_history_that_was_rewritten_with_new_hashes_shows_against_a_head_kept_elsewhere(
    entries: list[LedgerEntry], data: st.DataObject
) -> None:
    rows = [(entry["event"], entry["detail"]) for entry in entries]
    which = data.draw(st.integers(0, len(rows) - 1))
    rows[which] = (rows[which][0] + "!", rows[which][1])
    rewritten = chained(rows)
    assert verify_chain(rewritten) == []
    for head in map(ledger.head_of, (entries[:seq] for seq in range(which + 1, len(rows) + 1))):
        (fault,) = ledger.missing_head(rewritten, head.hash, head.seq)
        assert fault.entry == head.seq
        assert ledger.missing_head(rewritten, head.hash) != []


@pytest.mark.parametrize("previous", ["the one before", "another ledger's"])
@pytest.mark.parametrize("seq", [1, 2, 3])
def test_an_entry_with_a_hash_of_its_own_must_follow_by_number_and_by_link(
    previous: str, seq: int
) -> None:
    first, entry = chained([("start", {}), ("start", {})])
    link = first["hash"] if previous == "the one before" else "f" * 64
    entry["seq"], entry["previous"] = seq, link
    entry["hash"] = ledger.chain(link, seq, entry["time"], entry["event"], "{}")
    right = link == first["hash"] and seq == 2
    assert ([] if right else [2]) == sorted({f.entry for f in verify_chain([first, entry])})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: entry.update(note="read and approved"),
        lambda entry: entry.pop("previous"),
        lambda entry: entry.update(seq=True),
        lambda entry: entry.update(seq=1.0),
        lambda entry: entry.update(detail=[]),
        lambda entry: entry["detail"].update(x=float("nan")),
    ],
    ids=["a field more", "a field less", "true for 1", "1.0 for 1", "a list", "not a number"],
)
def test_what_is_no_entry_is_found(spoil: Callable[[Any], Any]) -> None:
    entries = chained([("start", {"stack": []})])
    spoil(entries[0])
    assert [fault.entry for fault in verify_chain(entries)] == [1]
    others: tuple[Any, ...] = (None, [], "entry", 7)
    for other in others:
        assert verify_chain([other]) == [Fault(1, "it is no JSON object")]


def test_a_head_that_lies_behind_the_end_says_that_it_was_cut_off() -> None:
    entries = chained([("start", {}), ("start", {})])
    (fault,) = ledger.missing_head(entries[:1], entries[1]["hash"], 2)
    assert "cut off" in str(fault)
    assert ledger.missing_head([], GENESIS, 0) == []


# -- files -----------------------------------------------------------------------------------------


@given(ledgers)
def test_an_exported_ledger_reads_back_as_it_was(entries: list[LedgerEntry]) -> None:
    read, faults = parse(jsonl(entries).encode().split(b"\n"))
    assert faults == []
    assert list(map(repr, read)) == list(map(repr, entries))
    assert verify_chain(read) == []


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"[" * 100_000,
        b'{"seq": NaN}',
        b'{"seq": 1, "seq": 1}',
        b'{"seq": ' + b"9" * 5000 + b"}",
    ],
    ids=["nothing", "half", "bytes", "a list", "deep", "NaN", "twice", "digits"],
)
def test_a_line_that_is_no_entry_is_found_with_its_number(line: bytes) -> None:
    good = jsonl(chained([("start", {}), ("start", {})])).encode().splitlines()
    read, faults = parse([good[0], line, good[1], b""])
    assert len(read) == 2
    assert [fault.what.partition(":")[0] for fault in faults] == ["line 2"]


def test_a_field_that_stands_twice_is_found() -> None:
    (line,) = jsonl(chained([("start", {"actor": "me"})])).encode().splitlines()
    assert parse([line])[1] == []
    for twice in (b'{"event":"stop",' + line[1:], line.replace(b'{"actor"', b'{"actor":1,"actor"')):
        assert [fault.what.partition(":")[0] for fault in parse([twice])[1]] == ["line 1"]


def test_a_reason_that_is_a_formula_stays_text_in_a_spreadsheet() -> None:
    reason = '=HYPERLINK("http://x","click")'
    text = csv_text(chained([("change-done", {"reason": reason, "actor": "-1+1", "after": [A]})]))
    header, row = text.splitlines()
    assert header.startswith("seq,time,event,change,actor")
    assert "'=HYPERLINK" in row
    assert ",'-1+1," in row
    assert A in row


# -- what was in force -----------------------------------------------------------------------------


def change(before: list[str], after: list[str], event: str = "change-done") -> tuple[str, Any]:
    return event, {"before": before, "after": after}


STORY: list[tuple[str, dict[str, Any]]] = [
    ("token-set", {"name": "admin"}),
    ("start", {"stack": []}),
    ("patch-stored", {"patch": A}),
    change([], [A], "change-intent"),
    change([], [A]),  # 5
    change([A], [A, B], "change-intent"),
    ("change-failed", {"before": [A], "after": [A, B], "cause": "guard-breached"}),
    ("drift-healed", {"stack": [A]}),
    ("drift-gone", {"modules": []}),
    ("start-without-restore", {"held": [A]}),  # 10
    ("start", {"stack": [A]}),
    ("start-restored", {"stack": [A]}),
    change([A], [A, B], "change-intent"),
    ("start", {"stack": [A]}),  # the server was killed
    change([A], [A, B], "change-interrupted"),  # 15
    change([A], [A, C]),
    ("ttl-confirmed", {"patches": [C]}),
    ("change-done", {"before": [A, C], "after": [C], "actor": "ttl"}),
    ("start-disabled", {"held": [C]}),
    ("change-intent", {"before": [], "after": [B]}),  # 20
    ("change-done", {"before": [], "after": [B]}),
    ("detach", {"held": [B]}),
    ("detach-restored", {"stack": []}),
]
IN_FORCE = {0: "", 1: "", 4: "", 5: "A", 9: "A", 10: "", 11: "A", 15: "A", 16: "AC", 18: "C"} | {
    19: "",
    20: "",
    21: "B",
    22: "",
    59: "",
}


@pytest.mark.parametrize("minute", IN_FORCE)
def test_the_stack_of_any_time_is_told_from_the_entries_alone(minute: int) -> None:
    found = stack_at(chained(STORY), moment(at(minute)))
    assert found.stack == tuple({"A": A, "B": B, "C": C}[name] for name in IN_FORCE[minute])
    assert found.suspended == (minute in (10, 19, 20, 22, 59))
    assert not found.ambiguous


def test_the_entry_that_put_a_patch_on_and_since_when_it_is_there_without_a_break() -> None:
    entries = chained(STORY)
    put_on, since = ledger.put_on(entries[:15], A), ledger.in_force_since(entries[:15], A)
    assert put_on is not None
    assert since is not None
    assert (put_on["seq"], since["seq"]) == (5, 11)  # a start left it out in between
    assert ledger.put_on(entries, A) is ledger.in_force_since(entries, A) is None


@given(st.lists(st.sampled_from(STORY), max_size=8), st.integers(0, 59))
def test_any_story_is_told_or_contradicts_itself(
    story: list[tuple[str, dict[str, Any]]], minute: int
) -> None:
    """Against a reading of its own: the last of what counts decides."""
    entries = chained(story)
    states, faults = ledger.replay(entries)
    if faults:
        with pytest.raises(VerificationError, match="contradicts itself"):
            stack_at(entries, moment(at(minute)))
        return
    now = story[:minute]
    done = [detail["after"] for event, detail in now if event == "change-done"]
    deciding = [event for event, _ in now if event.startswith(("start", "change-done", "detach"))]
    deciding = [event for event in deciding if not event.endswith("-restored")]
    out = deciding[-1:] and deciding[-1] in ("start-without-restore", "start-disabled", "detach")
    assert stack_at(entries, moment(at(minute))).stack == (
        () if out or not done else tuple(done[-1])
    )
    assert len(states) == len(entries)


@pytest.mark.parametrize(
    "entry",
    [
        change([B], [A, B]),
        change([B], [A, B], "change-intent"),
        ("change-done", {"before": [A]}),
        ("change-done", {"before": [A], "after": "all"}),
        ("start", {"stack": []}),
        ("start-disabled", {"held": [A, B]}),
        ("start-restored", {"stack": [B]}),
    ],
    ids=lambda entry: entry[0],
)
def test_an_entry_that_contradicts_those_before_it_is_found(entry: tuple[str, Any]) -> None:
    entries = chained([*STORY[:5], entry])
    assert verify_chain(entries) == []
    assert [fault.entry for fault in ledger.replay(entries)[1]] == [6]


def test_a_clock_that_was_set_back_is_told() -> None:
    rows = [change([], [A]), change([A], [B]), change([B], [C])]
    entries = chained(rows, [at(1), at(30), at(20)])
    assert stack_at(entries, moment(at(10))) == ledger.At((A,), False, 1, False)
    assert stack_at(entries, moment(at(25))) == ledger.At((C,), False, 3, True)
    assert stack_at(entries, moment(at(40))) == ledger.At((C,), False, 3, False)


def test_a_time_that_is_none_is_refused_with_its_entry() -> None:
    with pytest.raises(VerificationError, match="Entry 1"):
        stack_at(chained([change([], [A])], ["yesterday"]), moment(at(1)))


def test_an_engine_may_serve_what_it_did_at_any_moment_while_it_was_asked() -> None:
    states, _ = ledger.replay(chained([change([], [A]), change([A], [B])]))
    assert ledger.disagreement(states, [A], known=1) == []
    assert ledger.disagreement(states, [B], known=1) == []
    assert ledger.disagreement(states, [A], known=2) != []
    assert ledger.disagreement(states, [], known=1) != []
    assert ledger.disagreement([], [], known=0) == []


# -- which entries ---------------------------------------------------------------------------------


def numbers(wanted: Filter) -> list[int]:
    return [entry["seq"] for entry in chained(STORY) if wanted(entry)]


def test_filters_hold_all_together() -> None:
    assert numbers(Filter()) == list(range(1, len(STORY) + 1))
    assert numbers(Filter(events=("start",))) == [2, 10, 11, 12, 14, 19]
    assert numbers(Filter(events=("change-done", "token-set"))) == [1, 5, 16, 18, 21]
    assert numbers(Filter(events=("chang",))) == []
    assert numbers(Filter(patch=C)) == [16, 17, 19]
    assert numbers(Filter(events=("change",), patch=A)) == [4, 5, 18]
    assert numbers(Filter(since=moment(at(3)), until=moment(at(5)))) == [3, 4]
    assert numbers(Filter(since=moment("2026-11-24T05:20:00+02:00"))) == [20, 21, 22, 23]


def test_a_shortened_id_names_one_patch_or_is_refused() -> None:
    entries = chained([change([], [A]), change([A], [A, "aaaab" + "0" * 59])])
    assert ledger.named(chained(STORY), " AAAA") == A
    assert ledger.named(entries, "aaaab") == "aaaab" + "0" * 59
    with pytest.raises(AmbiguousIdError, match="aaaa"):
        ledger.named(entries, "aaaa")
    for unknown in ("dddd", "aaa", ""):
        with pytest.raises(UnknownPatchError):
            ledger.named(entries, unknown)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "2026-11-24",
        "2026-11-24T03:00:00",
        "20261124T030000Z",
        "2026-13-24T03:00:00Z",
        "2026-11-24T03:00:00+99:00",
        "0001-01-01T00:00:00+14:00",
    ],
)
def test_a_time_that_nobody_could_tell_apart_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a time"):
        moment(text)


def test_the_empty_ledger_is_the_base() -> None:
    assert ledger.head_of([]) == Head()
    assert State().in_force == stack_at([], moment(at(0))).stack == ()
