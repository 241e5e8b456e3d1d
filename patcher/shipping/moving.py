"""Sending a patch file with what lies beside it, and getting one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..address import is_loopback
from ..errors import InvalidPatchError, UsageError
from ..patch import Patch, files
from ..signing import MAX_BUNDLE_BYTES, bundle_subject, bundles_of
from ..signing.bundles import beside
from .anywhere import Anywhere
from .hub import HubFile
from .places import BESIDE, MAX_REPORT_BYTES, Parcel, Place, named_by_content, parsed, shown
from .registry import OciArtifact
from .web import WebFile


def push(
    path: Path,
    target: str,
    *,
    signatures: Iterable[Path] = (),
    report: Path | None = None,
    insecure: bool = False,
) -> str:
    """Send a patch file, its signatures, and a report on it; returns where it lies, pinned.

    Args:
        path: the patch file; the signatures beside it go along.
        target: a URL.
        signatures: more of them.
        report: a file like the page of ``patcher evaluate --report``.
        insecure: speak plain http to a host that isn't this machine.

    Raises:
        InvalidPatchError: the file is damaged.
        ShippingError: it can't be sent.
        UsageError: a URL that isn't one, a file that is no signature of the patch.
    """
    bare, pin = parsed(target)
    patch = Patch.read(path)
    if pin not in (None, patch.id):
        raise UsageError(f"{path} is {patch.id[:12]}, not {str(pin)[:12]}.", "Leave the pin out.")
    found = _signatures(path, patch, signatures)
    if report is not None:
        found[_report_suffix(report)] = files.read(report, MAX_REPORT_BYTES)
    _check_plain_http(bare, insecure)
    where = _place(bare, insecure).send(Parcel(patch.data, found))
    return f"{where}#sha256={patch.id}"


def pull(
    source: str, *, pin: str | None = None, insecure: bool = False
) -> tuple[Patch, dict[str, bytes]]:
    """The patch at a URL and what lies beside it there, by suffix (``.alice.sig``).

    ``pin``: the id that it must have, unless the URL says it (``#sha256=…``). ``insecure``:
    by plain http from a host that isn't this machine.

    Raises:
        ShippingError: nothing is there, or it can't be had.
        InvalidPatchError: it is no sound patch, or another one than pinned.
        UsageError: a URL that isn't one.
    """
    bare, named = parsed(source)
    _check_plain_http(bare, insecure or pin is not None or named is not None)
    parcel = _place(bare, insecure).fetch()
    patch = Patch.from_bytes(parcel.data)
    for wanted in (pin, named):
        if wanted not in (None, patch.id):
            raise InvalidPatchError(
                f"{shown(bare)} holds {patch.id[:12]}, not {str(wanted)[:12]}.",
                "Somebody exchanged it, or the pin is of another version.",
            )
    return patch, {
        suffix: data for suffix, data in parcel.beside.items() if _belongs(suffix, data, patch.id)
    }


def save(patch: Patch, beside_it: dict[str, bytes], path: Path) -> list[Path]:
    """Write a pulled patch and what came with it; the patch last. Returns the other files."""
    others = []
    for suffix, data in sorted(beside_it.items()):
        others.append(path.with_name(path.name + suffix))
        files.write(others[-1], data)
    patch.write(path)
    return others


def _belongs(suffix: str, data: bytes, patch_id: str) -> bool:
    """Whether it can lie beside the patch; other names and others' signatures may be a trick."""
    if not BESIDE.fullmatch(suffix):
        return False
    return not suffix.endswith(".sig") or bundle_subject(data) == patch_id


def _signatures(path: Path, patch: Patch, named: Iterable[Path]) -> dict[str, bytes]:
    """By suffix: those beside the file under their own, others under one that nobody else has."""
    given = dict.fromkeys(bundle for _, bundle in bundles_of([(patch.id, path)], named))
    found: dict[str, bytes] = {}
    for one in beside(path):
        suffix = one.name.removeprefix(path.name)
        if BESIDE.fullmatch(suffix):
            data = files.read(one, MAX_BUNDLE_BYTES)
            if data in given:
                found[suffix] = data
    known = set(found.values())
    return found | {named_by_content(data): data for data in given if data not in known}


def _check_plain_http(url: str, allowed: bool) -> None:
    """Anybody on the way could exchange what comes by plain http, unless its id is known."""
    if url.lower().startswith("http://") and not allowed and not is_loopback(url):
        raise UsageError(
            f"{shown(url)} is plain http.", "Use https, pin the id with #sha256=…, or --insecure."
        )


def _report_suffix(report: Path) -> str:
    suffix = f".report{report.suffix.lower()}"
    if not BESIDE.fullmatch(suffix):
        raise UsageError(
            f"{report} is no kind of report that is shipped.",
            "Give .html, .json, .txt, .md or .pdf.",
        )
    return suffix


def _place(url: str, insecure: bool) -> Place:
    scheme = url.partition("://")[0].lower()
    if scheme == "oci":
        return OciArtifact(url, insecure=insecure)
    if scheme == "hf":
        return HubFile(url)
    return WebFile(url) if scheme in ("http", "https") else Anywhere(url)
