"""The HTTP client of an engine that runs the plugin: what the CLI and other programs use.

The protocol is ``docs/protocol.md``. Answers are plain dictionaries, typed here by the
fields that they have at least; a newer engine may send more. Every error is one of
:mod:`patcher.errors`; the token is in none of them.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterable, Sequence
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import httpx

from patcher.address import checked_token, checked_url, host_of, is_loopback, request_headers
from patcher.durations import seconds
from patcher.errors import (
    AlreadyAppliedError,
    EngineUnreachableError,
    UnknownPatchError,
    UsageError,
)
from patcher.given import PatchSource, guards_in, patches_in, resolve, whole_id
from patcher.problems import is_entry, json_object, refusal
from patcher.protocol import (
    ROUTE,
    Change,
    InFlight,
    LedgerEntry,
    Plan,
    Signed,
    Status,
    StoredPatch,
    Uploaded,
    Verification,
)

if TYPE_CHECKING:
    from patcher.guards import GuardSource
    from patcher.patch import Patch

_CONNECT_S = 5.0
# A change may wait for running requests to end (``drain``), a check reads whole weights.
_CHANGE_S = 3600.0
_VERIFY_S = 600.0


class Engine:
    """A running engine, spoken to over HTTP.

    ``url`` is the server's root (not its ``/v1``), by default ``PATCHER_ENGINE``; ``token``
    an admin token of the plugin (never vLLM's API key), by default ``PATCHER_TOKEN``.
    ``timeout`` is how many seconds an answer may take; changes of the stack wait up to an
    hour, because draining may last. ``transport``: how requests get there, where not by
    a socket (:func:`patcher.attach`).

    >>> import patcher
    >>> with patcher.Engine("http://127.0.0.1:8000", token="...") as engine:
    ...     change = engine.apply("forget.st", reason="request 17")
    ...     engine.verify()["ok"]
    ...     engine.revert(change["stack"][-1])["stack"]
    True
    []

    Raises :class:`~patcher.errors.UsageError` for a URL or token that can't be one. Every
    method raises :class:`~patcher.errors.EngineUnreachableError` when nothing answers at the
    URL or what answers has no plugin, and :class:`~patcher.errors.PermissionDeniedError`
    when the token is missing, unknown or too weak.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        timeout: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = checked_url(url or os.environ.get("PATCHER_ENGINE") or "")
        token = checked_token(token or os.environ.get("PATCHER_TOKEN") or "")
        self._timeout = timeout
        self._client = httpx.Client(
            headers=request_headers(token),
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_S)),
            transport=transport,
            # Servers drop idle connections after five seconds: be first.
            limits=httpx.Limits(keepalive_expiry=2.0),
            # An engine on this very machine is never reached through the environment's proxy.
            mounts={f"all://{host_of(self.url)}": None} if is_loopback(self.url) else {},
        )

    def __repr__(self) -> str:
        return f"Engine({self.url!r})"

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back. The object can't be used afterwards."""
        self._client.close()

    def status(self) -> Status:
        """What is in force, per patch and per module, and since when."""
        return cast(Status, self._call("GET", "status", ("engine", "stack", "weight_version")))

    def upload(self, patch: PatchSource) -> Uploaded:
        """Give the engine a patch without putting it in force; again is fine.

        Signatures that lie beside a file (``P.st.sig``, ``P.st.alice.sig``) go with it.

        Raises :class:`~patcher.errors.InvalidPatchError` before any request if the file is
        damaged.
        """
        (read,), bundles = patches_in([patch])
        (uploaded,) = self._give([read], bundles)
        return uploaded

    def sign(self, patch_id: str, bundle: bytes) -> Signed:
        """Give the engine a signature of a patch that it holds; again is fine.

        ``signer`` in the answer is whose it is by the engine's trust policy, or None.

        Raises :class:`~patcher.errors.InvalidPatchError` for what is no signature of that patch.
        """
        path = f"patches/{whole_id(patch_id)}/signatures"
        return cast(Signed, self._call("POST", path, ("patch", "signer"), content=bundle))

    def signatures(self, patch_id: str) -> list[dict[str, Any]]:
        """The signatures of a patch that the engine holds: Sigstore bundles, the oldest first."""
        path = f"patches/{whole_id(patch_id)}/signatures"
        answer = self._call("GET", path, ("signatures",))
        return cast("list[dict[str, Any]]", answer["signatures"])

    def patches(self) -> list[StoredPatch]:
        """The patches that the engine holds, in force or not."""
        return cast("list[StoredPatch]", self._call("GET", "patches", ("patches",))["patches"])

    def download(self, patch_id: str) -> Patch:
        """The patch of that (whole) id, as the engine holds it."""
        from patcher.patch import Patch

        return Patch.from_bytes(self._request("GET", f"patches/{whole_id(patch_id)}").content)

    def apply(
        self,
        *patches: PatchSource,
        in_flight: InFlight = "recompute",
        reason: str = "",
        guards: GuardSource | Sequence[GuardSource] = (),
        ttl: str | float | None = None,
        signatures: Sequence[str | PathLike[str]] = (),
    ) -> Change:
        """Upload patches (paths, URLs, bytes, :class:`~patcher.Patch`) and put them on the top.

        All of them or none, in one change. Files are read and checked before the first
        request; of URLs see docs/shipping.md. ``in_flight`` says what happens to running
        requests: ``recompute`` (they go on, recomputed under the new weights), ``drain`` (they
        end first), ``abort``, ``continue`` (they go on over what the old weights cached; nobody
        else gets that).
        ``guards`` are JSON Lines files or mappings (docs/protocol.md, "Guards") that must hold
        on the live engine, or the change is taken back. ``ttl`` (seconds, or a text like
        ``2h``) is when these patches are reverted, unless :meth:`confirm` comes first.
        ``signatures``: bundles beside those that lie next to the files (:meth:`upload`).

        Raises :class:`~patcher.errors.InvalidPatchError`,
        :class:`~patcher.errors.ShippingError` (nothing to be had at a URL),
        :class:`~patcher.errors.TrustError` (the engine's policy doesn't admit a patch),
        :class:`~patcher.errors.AlreadyAppliedError`,
        :class:`~patcher.errors.BaseMismatchError`,
        :class:`~patcher.errors.StackConflictError` (somebody else changed the stack
        meanwhile), :class:`~patcher.errors.EngineRefusedError` (rolled back),
        :class:`~patcher.errors.GuardBreachedError` (the same; ``results`` has the guards'),
        :class:`~patcher.errors.InputError` (a guard that can't be used).
        """
        if not patches:
            raise UsageError("No patch to apply.", "Name at least one patch file.")
        read, bundles = patches_in(patches, signatures)
        checked = guards_in(guards)
        lasts = None if ttl is None else seconds(ttl)
        status = self.status()
        wanted = list(status["stack"])
        for patch in read:
            if patch.id in wanted:
                raise AlreadyAppliedError(
                    f"Patch {patch.id[:12]} is in force already.",
                    "Nothing was changed; leave it out.",
                )
            wanted.append(patch.id)
        self._give(read, bundles)
        return self.set_stack(
            wanted,
            expect=status["weight_version"],
            in_flight=in_flight,
            reason=reason,
            guards=checked,
            ttl=lasts,
        )

    def plan(self, *patches: PatchSource, signatures: Sequence[str | PathLike[str]] = ()) -> Plan:
        """What :meth:`apply` would do: every rank checks and prepares it, and nothing is kept.

        Doesn't raise where the engine would refuse: look at ``ok`` and ``refusals``.
        """
        if not patches:
            raise UsageError("No patch to plan for.", "Name at least one patch file.")
        read, bundles = patches_in(patches, signatures)
        body = {
            "patches": [b64encode(patch.data).decode() for patch in read],
            "signatures": [b64encode(bundle).decode() for _, bundle in bundles],
        }
        answer = self._call("POST", "plan", ("ok", "refusals"), wait=_VERIFY_S, json=body)
        return cast(Plan, answer)

    def replace(
        self,
        patch: PatchSource,
        *ids: str,
        all: bool = False,  # noqa: A002 - the command's own word
        signatures: Sequence[str | PathLike[str]] = (),
        in_flight: InFlight = "recompute",
        reason: str = "",
        guards: GuardSource | Sequence[GuardSource] = (),
    ) -> Change:
        """Put a patch where the lowest of ``ids`` is, and take those out, in one change.

        ``all``: of the whole stack, as after :func:`patcher.patch.merge.merge`. Raises what
        :meth:`apply` and :meth:`revert` raise.
        """
        if all == bool(ids):
            raise UsageError("Say which patches to replace.", "Give their ids, or ask for all.")
        (read,), bundles = patches_in([patch], signatures)
        checked = guards_in(guards)
        status = self.status()
        stack = status["stack"]
        gone = set(stack if all else resolve(ids, stack))
        if not gone:
            raise UnknownPatchError("Nothing is in force.", "Use `patcher apply`.")
        if read.id in stack:
            raise AlreadyAppliedError(
                f"Patch {read.id[:12]} is in force already.", "Nothing was changed."
            )
        at = next(place for place, one in enumerate(stack) if one in gone)
        wanted = [read.id if place == at else one for place, one in enumerate(stack)
                  if place == at or one not in gone]  # fmt: skip
        self._give([read], bundles)
        return self.set_stack(
            wanted,
            expect=status["weight_version"],
            in_flight=in_flight,
            reason=reason,
            guards=checked,
        )

    def revert(
        self,
        *ids: str,
        all: bool = False,  # noqa: A002 - the command's own word
        in_flight: InFlight = "recompute",
        reason: str = "",
        guards: GuardSource | Sequence[GuardSource] = (),
    ) -> Change:
        """Take patches out of the stack, from anywhere in it; ``all`` gives the base back.

        Ids may be shortened to four hexadecimal digits or more while only one patch of the
        stack begins with them.

        Raises :class:`~patcher.errors.UnknownPatchError`,
        :class:`~patcher.errors.AmbiguousIdError`, and what :meth:`apply` raises for changes.
        """
        if all == bool(ids):
            raise UsageError("Say which patches to revert.", "Give their ids, or ask for all.")
        checked = guards_in(guards)
        status = self.status()
        gone = set(status["stack"] if all else resolve(ids, status["stack"]))
        return self.set_stack(
            [one for one in status["stack"] if one not in gone],
            expect=status["weight_version"],
            in_flight=in_flight,
            reason=reason,
            guards=checked,
        )

    def set_stack(
        self,
        stack: Sequence[str],
        *,
        expect: str,
        in_flight: InFlight = "recompute",
        reason: str = "",
        guards: GuardSource | Sequence[GuardSource] = (),
        ttl: str | float | None = None,
    ) -> Change:
        """Make the stack exactly ``stack`` (whole ids, the bottom first).

        ``expect`` is the weight version that the wish is based on: the engine refuses with
        :class:`~patcher.errors.StackChangedError` if it isn't the current one any more.
        """
        body: dict[str, Any] = {"stack": list(stack), "in_flight": in_flight, "reason": reason}
        if checked := guards_in(guards):
            body["guards"] = checked
        if ttl is not None:
            body["ttl"] = seconds(ttl)
        answer = self._call(
            "PUT",
            "stack",
            ("stack", "weight_version", "seconds", "pause_ms"),
            wait=_CHANGE_S,
            headers={"If-Match": f'"{expect}"'},
            json=body,
        )
        return cast(Change, answer)

    def confirm(
        self,
        *ids: str,
        all: bool = False,  # noqa: A002 - the command's own word
    ) -> list[str]:
        """Let patches with a time to live stay; returns the ids of those that would not have.

        Ids may be shortened as for :meth:`revert`. Raises
        :class:`~patcher.errors.UnknownPatchError`, :class:`~patcher.errors.AmbiguousIdError`,
        and :class:`~patcher.errors.StackConflictError` for a patch that requires one whose
        time still runs.
        """
        if all == bool(ids):
            raise UsageError("Say which patches to confirm.", "Give their ids, or ask for all.")
        wanted = None if all else resolve(ids, self.status()["stack"])
        # Waits for a change under way.
        body = {"patches": wanted}
        answer = self._call("POST", "confirm", ("confirmed",), wait=_VERIFY_S, json=body)
        return cast("list[str]", answer["confirmed"])

    def verify(self) -> Verification:
        """Have every rank read its live weights and compare them with what they must be.

        Doesn't raise when they differ: look at ``ok``.
        """
        return cast(Verification, self._call("POST", "verify", ("ok", "modules"), wait=_VERIFY_S))

    def heal(self) -> Verification:
        """Put back what a weight reload or a wake from sleep reset to the base; then verify.

        Raises :class:`~patcher.errors.VerificationError` where a live weight is neither what
        was put there nor its base.
        """
        return cast(Verification, self._call("POST", "heal", ("ok", "modules"), wait=_VERIFY_S))

    def ledger(self, after: int = 0) -> list[LedgerEntry]:
        """Who changed the stack, when and to what: the entries after number ``after``."""
        answer = self._call("GET", "ledger", ("entries",), params={"after": after})
        entries = answer["entries"]
        if not (isinstance(entries, list) and all(map(is_entry, entries))):
            raise self._other_protocol("GET", "ledger")
        return cast("list[LedgerEntry]", entries)

    def _give(self, read: Sequence[Patch], bundles: Iterable[tuple[str, bytes]]) -> list[Uploaded]:
        # Patches first: a signature is taken only of one that the engine holds.
        uploaded = [self._upload(patch) for patch in read]
        for patch_id, bundle in bundles:
            self.sign(patch_id, bundle)
        return uploaded

    def _upload(self, patch: Patch) -> Uploaded:
        kind = {"Content-Type": "application/octet-stream"}
        answer = self._call("POST", "patches", ("id",), headers=kind, content=patch.data)
        return cast(Uploaded, answer)

    def _call(self, method: str, path: str, needs: Iterable[str], **options: Any) -> dict[str, Any]:
        # A JSON object with at least the fields `needs`.
        answer = json_object(self._request(method, path, **options))
        if answer is None or any(field not in answer for field in needs):
            raise self._other_protocol(method, path)
        return answer

    def _other_protocol(self, method: str, path: str) -> EngineUnreachableError:
        return EngineUnreachableError(
            f"{self.url} answered {method} {path}, but not in patcher's protocol.",
            "Is something else answering at that URL, or a plugin of another version?",
        )

    def _request(
        self, method: str, path: str, *, wait: float | None = None, **options: Any
    ) -> httpx.Response:
        if wait is not None:
            limit = httpx.Timeout(self._timeout, read=wait, connect=min(self._timeout, _CONNECT_S))
            options["timeout"] = limit
        try:
            answer = self._client.request(method, f"{self.url}{ROUTE}/{path}", **options)
        except httpx.HTTPError as error:
            # "from None": a transport's exception carries the request, and that the token.
            raise self._no_answer(method, error) from None
        if answer.is_success:
            return answer
        raise refusal(answer, self.url)

    def _no_answer(self, method: str, error: httpx.HTTPError) -> EngineUnreachableError:
        sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        if method == "PUT" and sent:
            cure = (
                "Whether the change was made is not known: look with `patcher status`. "
                "Asking again is safe."
            )
        else:
            cure = "Is the engine running, and is this its URL?"
        why = "it took too long" if isinstance(error, httpx.TimeoutException) else str(error)
        return EngineUnreachableError(f"No answer from {self.url} ({why or 'no reason'}).", cure)
