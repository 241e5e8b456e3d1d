"""The words of the engine's protocol: where it lives and what its answers have at least.

The whole of it is ``docs/protocol.md``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Literal, NotRequired, TypeAlias, get_args

from typing_extensions import TypedDict  # pydantic reads no other before 3.12

ROUTE = "/plugins/patcher/v1"
STATEMENT = "https://in-toto.io/Statement/v1"  # what certificates and kept heads are

InFlight: TypeAlias = Literal["recompute", "drain", "abort", "continue"]
IN_FLIGHT: tuple[InFlight, ...] = get_args(InFlight)


def weight_version(ids: Iterable[str]) -> str:
    """What names a stack (its ids, the bottom first): sha256 over them, each with a newline."""
    return hashlib.sha256("".join(f"{i}\n" for i in ids).encode()).hexdigest()


class EngineInfo(TypedDict):
    """What serves."""

    vllm: str
    patcher: str
    model: str
    dtype: str
    platform: str
    world_size: int
    eager: bool
    weight_version: str | None
    state: str


class PatchInForce(TypedDict):
    """A patch of the stack; ``modules`` maps each module that it changes to its rank.

    ``expires``: when it is reverted by itself; null where it stays.
    """

    id: str
    title: str
    since: str
    expires: NotRequired[str | None]
    modules: dict[str, int]


class Process(TypedDict):
    """A process of the engine and the version of the plugin in it (null: none).

    ``engine``: which data-parallel engine, from 0; ``rank`` counts within it.
    """

    engine: int
    rank: int
    pid: int
    plugin: str | None


class Trust(TypedDict):
    """``policy``: SHA-256 of the policy's file; ``signatures``: how many signers are needed."""

    policy: str
    signatures: int
    unsigned: bool
    signers: list[str]


class Status(TypedDict):
    """``base``: module -> digest of its pristine weights; ``stack``: ids, the bottom first.

    ``overlaid``: the quantised modules, whose patches cost something at every token.
    ``trust``: whose signatures patches need; null where they need none.
    """

    engine: EngineInfo
    base: dict[str, str]
    stack: list[str]
    weight_version: str
    patches: list[PatchInForce]
    modules: dict[str, list[str]]
    trust: Trust | None
    overlaid: list[str]
    processes: list[Process]


class Uploaded(TypedDict):
    """A patch that the engine holds now; ``modules`` as in :class:`PatchInForce`."""

    id: str
    bytes: int
    modules: dict[str, int]


class Signed(TypedDict):
    """A signature that the engine holds now; ``signer``: whose, by its trust policy."""

    patch: str
    signer: str | None


class StoredPatch(TypedDict):
    """A patch that the engine holds, in force or not."""

    id: str
    title: str
    bytes: int
    stored: str
    in_force: bool


class GuardResult(TypedDict):
    """What one bound of one guard came to, on the data-parallel engine where it came out worst.

    ``guard``: its name; ``bound``: which of its bounds; ``limit``: the bound where it is a
    number; ``value``: what was measured, a number or whether the words were said; null where
    it couldn't be, and ``problem`` says why. No text of the guard, and none of the engine's.
    """

    guard: str
    bound: str
    limit: float | None
    value: float | bool | None
    ok: bool
    engine: int
    problem: str


class Change(TypedDict):
    """The stack after a change. ``seconds``: all of it; ``pause_ms``: how long nothing ran.

    ``mixed``: how many requests go on over KV of the weights before (``continue``).
    ``spaced_ms``: how long it waited for requests that an earlier change had recomputed.
    ``guards``: the guards' results, all of them ok. ``questions``: what might be a slip.
    ``change``: its id in the ledger and in the server's log.
    """

    change: str
    stack: list[str]
    weight_version: str
    seconds: float
    pause_ms: float
    mixed: int
    spaced_ms: float
    guards: NotRequired[list[GuardResult]]
    questions: NotRequired[list[str]]


class Refusal(TypedDict):
    """Why a planned change would be refused: an error as it would come."""

    code: str
    message: str
    cure: str
    exit_code: int


class PlannedModule(TypedDict):
    """``patches``: that would touch it, the bottom first; ``bytes``: of its weight."""

    patches: list[str]
    bytes: int


class Plan(TypedDict):
    """What a change would do; nothing was done. ``ok``: whether nothing refuses it.

    ``questions``: what might be a slip. ``signers``: by patch, under the engine's trust policy.
    ``staged_bytes``: memory beside the live weights while it is prepared, over all ranks of one
    engine; ``base_bytes``: host memory for pristine copies, as long as it is in force.
    ``pause_ms``: the median stop of this server's last changes; null before the first.
    """

    ok: bool
    stack: list[str]
    weight_version: str
    refusals: list[Refusal]
    questions: list[str]
    signers: dict[str, list[str]]
    modules: dict[str, PlannedModule]
    staged_bytes: int
    base_bytes: int
    pause_ms: float | None
    seconds: float


class LiveModule(TypedDict):
    """A rank's part of a weight as it serves: its digest, and whether it is what must be."""

    ok: bool
    digest: str


class LiveRank(TypedDict):
    """What one rank serves."""

    engine: int
    rank: int
    stack: list[str]
    modules: dict[str, LiveModule]


class Verification(TypedDict):
    """``modules``: whether each live weight is what (base, stack) must give, on every rank."""

    ok: bool
    modules: dict[str, bool]
    weight_version: str
    ranks: list[LiveRank]


class LedgerEntry(TypedDict):
    """One entry of the ledger; what ``detail`` has depends on ``event``.

    ``hash``: sha256 over ``previous``, the hash of the entry before, and the entry's own fields.
    """

    seq: int
    time: str
    event: str
    detail: dict[str, Any]
    previous: str
    hash: str
