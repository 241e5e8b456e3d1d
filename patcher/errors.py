"""Every error that patcher raises on purpose, and the exit code of each.

::

    PatcherError                     1   a defect of ours, or one that nobody foresaw
    ├── UsageError                   2   the call's words are off            (caller)
    ├── InvalidPatchError            3   the file is damaged or malformed    (who made the file)
    │   └── FormatVersionError       3   a format that this version can't read
    ├── BaseMismatchError            4   computed on other weights           (who chose the patch)
    ├── TrustError                   5   not signed as the policy asks       (who signs)
    ├── StackConflictError           6   the stack doesn't admit the change  (caller)
    │   ├── UnknownPatchError        6   no such id in the stack or store
    │   ├── AmbiguousIdError         6   a shortened id fits several
    │   ├── AlreadyAppliedError      6   the patch is in force already
    │   └── StackChangedError        6   somebody else changed it before
    │       └── StackRacedError      6   another change, asked for at the same time, won
    ├── EngineUnreachableError       7   no answer from that URL             (operator)
    ├── EngineRefusedError           8   refused or rolled back; as before   (operator)
    ├── VerificationError            9   live weights or ledger are not what they must be (operator)
    ├── PermissionDeniedError       10   token missing or unknown            (caller)
    │   └── RoleTooWeakError        10   the token may do less than this     (caller)
    ├── InputError                  11   forget set, text or model unusable  (caller)
    │   ├── ForgetSetError          11
    │   ├── ModelError              11
    │   ├── NumericalError          11   numbers that are not finite, an unstable solve
    │   └── NotEnoughMemoryError    11   more memory needed than there is
    ├── BarsNotMetError             12   a patch, but not within all of its bars (caller)
    ├── GuardBreachedError          13   a guard did not hold; rolled back   (who chose the patch)
    └── ShippingError               14   a patch can't be sent or fetched    (who keeps that place)

The word in brackets says who can mend it. ``code`` is the error's name on the
wire (``application/problem+json``, see ``docs/protocol.md``).
"""

from __future__ import annotations

from typing import Any, ClassVar


class PatcherError(Exception):
    """Base of all. ``message`` names the cause, ``cure`` what to do about it.

    ``details``: what a program may want to know, as JSON values; sent with the error.
    """

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, cure: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.cure = cure
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} {self.cure}".strip()


class UsageError(PatcherError):
    """The call's words are off."""

    code = "usage"
    exit_code = 2
    http_status = 400


class InvalidPatchError(PatcherError):
    """The patch file is damaged or malformed."""

    code = "invalid-patch"
    exit_code = 3
    http_status = 422


class FormatVersionError(InvalidPatchError):
    """The patch file is of a format that this version can't read."""

    code = "format-version"


class BaseMismatchError(PatcherError):
    """The patch was computed on other weights."""

    code = "base-mismatch"
    exit_code = 4
    http_status = 422


class TrustError(PatcherError):
    """The patch isn't signed as the policy asks."""

    code = "not-trusted"
    exit_code = 5
    http_status = 403


class StackConflictError(PatcherError):
    """The stack doesn't admit the change."""

    code = "stack-conflict"
    exit_code = 6
    http_status = 409


class UnknownPatchError(StackConflictError):
    """No patch of that id is in the stack or the store."""

    code = "unknown-patch"
    http_status = 404


class AmbiguousIdError(StackConflictError):
    """A shortened id fits several patches."""

    code = "ambiguous-id"


class AlreadyAppliedError(StackConflictError):
    """The patch is in force already."""

    code = "already-applied"


class StackChangedError(StackConflictError):
    """Somebody else changed the stack before. ``details``: ``stack``, ``weight_version`` now."""

    code = "stack-changed"
    http_status = 412


class StackRacedError(StackChangedError):
    """Two changes at once: another one won. ``details``: ``stack``, ``weight_version`` now."""

    code = "stack-raced"
    http_status = 409


class EngineUnreachableError(PatcherError):
    """No answer from that URL, or not from the plugin."""

    code = "engine-unreachable"
    exit_code = 7
    http_status = 502


class EngineRefusedError(PatcherError):
    """The engine refused or rolled back; what was in force still is."""

    code = "engine-refused"
    exit_code = 8
    http_status = 503


class VerificationError(PatcherError):
    """Live weights are not what base and stack must give, or a ledger does not hold."""

    code = "verification-failed"
    exit_code = 9
    http_status = 500


class PermissionDeniedError(PatcherError):
    """The token is missing or unknown."""

    code = "not-permitted"
    exit_code = 10
    http_status = 401


class RoleTooWeakError(PermissionDeniedError):
    """The token may do less than this."""

    code = "role-too-weak"
    http_status = 403


class InputError(PatcherError):
    """Forget set, text or model can't be used."""

    code = "bad-input"
    exit_code = 11
    http_status = 422


class ForgetSetError(InputError):
    """The forget set can't be used."""

    code = "bad-forget-set"


class ModelError(InputError):
    """The model can't be used."""

    code = "bad-model"


class NumericalError(InputError):
    """Numbers are not finite, or what is preserved makes no stable solve."""

    code = "not-finite"


class NotEnoughMemoryError(InputError):
    """The computation needs more memory than there is."""

    code = "not-enough-memory"


class BarsNotMetError(PatcherError):
    """A patch was computed and written, and does not keep within all of its bars.

    ``result``: the :class:`~patcher.unlearn.ComputeResult`, where it was raised by ``compute``.
    """

    code = "bars-not-met"
    exit_code = 12
    http_status = 422
    result: Any = None


class GuardBreachedError(PatcherError):
    """A guard did not hold on the live engine, or couldn't be asked; the stack before is back.

    ``details``: ``guards``, every guard's :class:`~patcher.protocol.GuardResult`.
    """

    code = "guard-breached"
    exit_code = 13
    http_status = 422

    @property
    def results(self) -> list[Any]:
        """Every guard's result, as it was sent."""
        return list(self.details.get("guards", []))


class ShippingError(PatcherError):
    """A patch can't be sent to a place, or fetched from it."""

    code = "not-shipped"
    exit_code = 14
    http_status = 502


def by_code(code: str) -> type[PatcherError]:
    """The class whose wire name is ``code``; :class:`PatcherError` for an unknown one."""
    queue: list[type[PatcherError]] = [PatcherError]
    while queue:
        cls = queue.pop()
        if cls.code == code:
            return cls
        queue.extend(cls.__subclasses__())
    return PatcherError
