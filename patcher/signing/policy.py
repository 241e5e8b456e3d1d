"""Whom an engine trusts: a TOML file, read once, and its answer for each patch.

::

    signatures = 2                       # of different signers; 1 if left out
    unsigned = false                     # whether patches need no signatures at all
    revoked-patches = ["3fa9…"]          # whole ids
    revoked-keys = ["9c1d…"]             # fingerprints, as `patcher keygen` prints them

    [[signer]]
    name = "alice"
    public-key = "alice.pub"             # beside the policy, or an absolute path
    models = ["HuggingFaceTB/*"]         # of manifests' base.model; any if left out
    not-after = 2027-06-30T00:00:00Z     # from then on alice's signatures count no more
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from ..errors import PatcherError, TrustError
from ..patch import Manifest, Patch
from ..text import NAME
from . import bundles
from .bundles import Verifier
from .keys import fingerprint

MAX_POLICY_BYTES = 1 << 20
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Table(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=lambda name: name.replace("_", "-")
    )


class SignerTable(_Table):
    """One ``[[signer]]``: a public key, certificates, or a keyless identity."""

    name: Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
    public_key: Path | None = None
    certificates: tuple[Path, ...] = ()
    common_name: str | None = None
    identity: str | None = None
    issuer: str | None = None
    trust_config: Path | None = None
    models: tuple[str, ...] = ("*",)
    not_after: AwareDatetime | None = None

    @model_validator(mode="after")
    def _one_way(self) -> SignerTable:
        ways = [self.public_key is not None, bool(self.certificates), self.identity is not None]
        if sum(ways) != 1:
            raise ValueError("needs one of public-key, certificates and identity")
        if (self.identity is None) != (self.issuer is None):
            raise ValueError("needs identity and issuer together")
        return self


class PolicyFile(_Table):
    """The whole file."""

    signatures: Annotated[int, Field(ge=1, le=64)] = 1
    unsigned: bool = False
    revoked_patches: frozenset[Digest] = frozenset()
    revoked_keys: frozenset[Digest] = frozenset()
    signer: tuple[SignerTable, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> PolicyFile:
        names = [one.name for one in self.signer]
        if len(set(names)) != len(names):
            raise ValueError("names a signer twice")
        if self.signatures > len(names) and not (self.unsigned and not names):
            raise ValueError(f"asks for {self.signatures} signatures of {len(names)} signers")
        return self


@dataclass(frozen=True)
class _Signer:
    """A signer with what checks it. ``key``: the public key's fingerprint, where it has one."""

    table: SignerTable
    verifier: Verifier
    key: str | None


@dataclass(frozen=True)
class TrustPolicy:
    """A policy with its keys as they were when it was read.

    ``digest``: SHA-256 of the file, for the ledger.
    """

    file: PolicyFile
    signers: tuple[_Signer, ...]
    digest: str

    @classmethod
    def read(cls, path: Path) -> TrustPolicy:
        """The policy in a file.

        Raises:
            TrustError: it can't be read, or isn't one, or names a key that isn't.
            UsageError: a package that its signers need isn't installed.
        """
        try:
            with path.open("rb") as opened:
                data = opened.read(MAX_POLICY_BYTES + 1)
            if len(data) > MAX_POLICY_BYTES:
                raise ValueError("too large")
            file = PolicyFile.model_validate(tomllib.loads(data.decode()))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(step) for step in first["loc"])
            raise _no_policy(path, f"{where} {first['msg']}".strip()) from None
        except (OSError, ValueError) as error:
            raise _no_policy(path, str(error)) from None
        signers = tuple(_signer(table, path.parent) for table in file.signer)
        keys = [one.key for one in signers if one.key is not None]
        if len(set(keys)) != len(keys):
            raise _no_policy(path, "two signers have the same key")
        return cls(file, signers, hashlib.sha256(data).hexdigest())

    @classmethod
    def of_key(cls, path: Path) -> TrustPolicy:
        """The policy that asks for one signature, by the public key in ``path``.

        Raises:
            TrustError: the file holds no such key.
            UsageError: a package isn't installed.
        """
        name = re.sub(r"[^\w.@+-]", "-", path.stem)[:64]
        table = SignerTable.model_validate({"name": name, "public-key": path.absolute()})
        file = PolicyFile(signer=(table,))
        return cls(file, (_signer(table, path.parent),), "")

    def check(self, patch: Patch, given: Sequence[bytes], at: datetime | None = None) -> list[str]:
        """The names of those who signed ``patch``, where that is enough.

        Args:
            patch: the patch as read.
            given: the bundles that came with it.
            at: when; now by default.

        Raises:
            TrustError: it isn't enough; ``rule`` in its details says which rule refuses.
        """
        if patch.id in self.file.revoked_patches:
            raise _refused(patch, "is revoked by the policy", "revoked-patches")
        counted, reasons = self._count(patch, given, at or datetime.now(UTC))
        wanted = self.file.signatures
        if len(counted) >= wanted or self.file.unsigned:
            return counted
        if not given:
            raise _refused(patch, "is not signed", "unsigned")
        told = f"has {len(counted)} of {wanted} signatures that count"
        rule = reasons[0][0] if reasons else "signatures"
        raise _refused(patch, "; ".join([told, *(text for _, text in reasons)]), rule)

    def _count(
        self, patch: Patch, given: Iterable[bytes], at: datetime
    ) -> tuple[list[str], list[tuple[str, str]]]:
        """Whose bundles hold and count, and for those that don't count the rule and why."""
        by_key: dict[str, _Signer] = {}  # a key counts once, whatever names it has
        for bundle in given:
            signer = self.signer_of(patch, bundle)
            if signer is not None:
                by_key.setdefault(bundles.signing_key(bundle) or signer.table.name, signer)
        counted: list[str] = []
        reasons: list[tuple[str, str]] = []
        for key, signer in by_key.items():
            name, rule = signer.table.name, self._rule_against(signer, key, patch.manifest, at)
            if rule is not None:
                reasons.append((rule, f"{name}'s does not ({rule})"))
            elif name not in counted:
                counted.append(name)
        return counted, reasons

    def signer_of(self, patch: Patch, bundle: bytes) -> _Signer | None:
        """Who of the policy made a bundle over exactly this patch's bytes, or None."""
        if bundles.bundle_subject(bundle) != patch.id:
            return None
        key = bundles.signing_key(bundle)
        likely = [s for s in self.signers if s.key is None or key is None or s.key == key]
        return next((s for s in likely if s.verifier.signed(patch.data, bundle)), None)

    def _rule_against(
        self, signer: _Signer, key: str, manifest: Manifest, at: datetime
    ) -> str | None:
        if {key, signer.key} & self.file.revoked_keys:
            return "revoked-keys"
        if signer.table.not_after is not None and at >= signer.table.not_after:
            return "not-after"
        if not any(fnmatchcase(manifest.base.model, one) for one in signer.table.models):
            return "models"
        return None


def _signer(table: SignerTable, folder: Path) -> _Signer:
    key = None
    try:
        if table.public_key is not None:
            path = folder / table.public_key
            key = fingerprint(path)
            verifier = bundles.by_key(path)
        elif table.identity is not None and table.issuer is not None:
            config = None if table.trust_config is None else folder / table.trust_config
            verifier = bundles.by_identity(table.identity, table.issuer, config)
        else:
            paths = [folder / one for one in table.certificates]
            verifier = bundles.by_certificates(paths, table.common_name)
    except PatcherError:
        raise
    except Exception as error:  # of many libraries below
        raise TrustError(
            f"The signer {table.name} can't be checked: {type(error).__name__}: {error}",
            "See to the files that the policy names for it.",
        ) from None
    return _Signer(table, verifier, key)


def _refused(patch: Patch, what: str, rule: str) -> TrustError:
    return TrustError(
        f"Patch {patch.id[:12]} {what}.",
        "Have it signed by whom the policy names, or have the policy changed.",
        rule=rule,
        patch=patch.id,
    )


def _no_policy(path: Path, why: str) -> TrustError:
    return TrustError(f"{path} is no trust policy: {why.rstrip('.')}.", "docs/trust.md shows one.")
