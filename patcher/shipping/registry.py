"""OCI registries, by ``oras``: a patch is an artifact, its signatures are its referrers.

Image and distribution specification 1.1. A registry without the referrers API (such as
``docker-registry`` 2.8) gets the index under the fallback tag that the specification has for it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..address import is_loopback
from ..errors import ShippingError, UsageError
from ..patch import canonical
from ..patch.container import MAX_FILE_BYTES
from ..signing import MAX_BUNDLE_BYTES
from .anywhere import MAX_REPORT_BYTES
from .needs import needed
from .places import Parcel

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
PATCH = "application/vnd.vllm-patcher.patch.v1+safetensors"
SIGNATURE = "application/vnd.dev.sigstore.bundle.v0.3+json"
REPORT = "application/vnd.vllm-patcher.report.v1"
SUFFIX = "org.vllm-patcher.suffix"  # annotation: what is put after the patch file's name
MAX_MANIFEST_BYTES = 1 << 20
_MOST_REFERRERS = 64
_TIMEOUT = 60.0  # seconds without a byte
Descriptor = dict[str, Any]


class OciArtifact:
    """``oci://host[:port]/repository[:tag]`` or ``…@sha256:…``."""

    def __init__(self, url: str, *, insecure: bool = False) -> None:
        self.url = url
        provider, container = needed("oras.provider"), needed("oras.container")
        try:
            self._at = container.Container(url.removeprefix("oci://"))
        except ValueError:
            raise UsageError(
                f"{url} names no repository.", "Write oci://host[:port]/repository:tag."
            ) from None
        plain = insecure or is_loopback(f"http://{self._at.registry}")

        class Registry(provider.Registry):  # type: ignore[misc, name-defined]
            # oras tries six times, two minutes in all; whoever waits can do that better.
            do_request = provider.Registry.do_request.__wrapped__

        self._registry = Registry(insecure=plain)
        adapter = _bounded_waits()
        for scheme in ("http://", "https://"):
            self._registry.session.mount(scheme, adapter)

    def send(self, parcel: Parcel) -> str:
        """Put patch and referrers there; the URL returned has the manifest's digest."""
        with self._trouble("Can't push to"):
            self._registry.auth.load_configs(self._at)
            layers = [self._put_blob(PATCH, parcel.data)]
            subject = self._put(_manifest(PATCH, layers), str(self._at.digest or self._at.tag))
            told = []
            for suffix, data in parcel.beside.items():
                kind = SIGNATURE if suffix.endswith(".sig") else REPORT
                manifest = _manifest(kind, [self._put_blob(kind, data)], subject, suffix)
                named = hashlib.sha256(_bytes(manifest)).hexdigest()
                told.append({**self._put(manifest, f"sha256:{named}"), "artifactType": kind})
            self._tell_referrers(subject, told)
        return f"oci://{self._at.registry}/{self._at.api_prefix}@{subject['digest']}"

    def fetch(self) -> Parcel:
        """The patch and its referrers; every blob is what its digest says."""
        with self._trouble("Can't pull from"):
            self._registry.auth.load_configs(self._at)
            raw = self._get(str(self._at.digest or self._at.tag), (MANIFEST,))
            if self._at.digest and self._at.digest != f"sha256:{hashlib.sha256(raw).hexdigest()}":
                raise ShippingError(f"{self.url} gave another manifest than its digest.", "")
            data = self._layer(raw, PATCH, MAX_FILE_BYTES)[1]
            digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
            beside: dict[str, bytes] = {}
            for one in self._referrers(digest)[:_MOST_REFERRERS]:
                if one.get("artifactType") in (SIGNATURE, REPORT):
                    suffix, content = self._beside(str(one.get("digest")), one["artifactType"])
                    beside[suffix] = content
        return Parcel(data, beside)

    # -- manifests and blobs ---------------------------------------------------------------------

    def _beside(self, digest: str, kind: str) -> tuple[str, bytes]:
        raw = self._get(digest, (MANIFEST,))
        _check(raw, digest)
        most = MAX_BUNDLE_BYTES if kind == SIGNATURE else MAX_REPORT_BYTES
        manifest, content = self._layer(raw, kind, most)
        return str((manifest.get("annotations") or {}).get(SUFFIX, "")), content

    def _layer(self, raw: bytes, kind: str, most: int) -> tuple[dict[str, Any], bytes]:
        """A manifest and the one layer of that type that it must have."""
        manifest = canonical.loads(raw)
        found = [one for one in manifest["layers"] if one["mediaType"] == kind]
        if len(found) != 1:
            raise ShippingError(f"{self.url} holds no patch.", "Is that the right repository?")
        size, digest = found[0]["size"], str(found[0]["digest"])
        if type(size) is not int or not 0 <= size <= most:
            raise ShippingError(
                f"{self.url} names {str(size)[:40]} bytes; {most} are read at most.",
                "Is that the right repository?",
            )
        answer = self._registry.get_blob(self._at, digest, stream=True)
        content = self._body(answer, size)
        _check(content, digest)
        return manifest, content

    def _get(self, reference: str, kinds: tuple[str, ...]) -> bytes:
        url = f"{self._registry.prefix}://{self._at.manifest_url(reference)}"
        answer = self._registry.do_request(url, headers={"Accept": ", ".join(kinds)}, stream=True)
        return self._body(answer, MAX_MANIFEST_BYTES)

    def _body(self, answer: Any, most: int) -> bytes:
        with answer:
            if answer.status_code == 404:
                raise ShippingError(f"{self.url} isn't there.", "Look at its name and tag.")
            answer.raise_for_status()
            content = bytearray()
            for part in answer.iter_content(1 << 16):
                content += part
                if len(content) > most:
                    raise ShippingError(f"{self.url} sends more than it said.", "Don't trust it.")
        return bytes(content)

    def _put(self, manifest: dict[str, Any], reference: str, kind: str = MANIFEST) -> Descriptor:
        raw = _bytes(manifest)
        url = f"{self._registry.prefix}://{self._at.manifest_url(reference)}"
        headers = {"Content-Type": kind}
        self._registry.do_request(url, "PUT", data=raw, headers=headers).raise_for_status()
        return _descriptor(kind, raw)

    def _put_blob(self, kind: str, data: bytes) -> Descriptor:
        described = _descriptor(kind, data)
        for content in (b"{}", data):  # the empty config, too
            with tempfile.TemporaryDirectory(prefix="patcher-") as folder:
                path = Path(folder) / "blob"
                path.write_bytes(content)
                layer = _descriptor(kind, content)
                self._registry.upload_blob(str(path), self._at, layer).raise_for_status()
        return described

    # -- referrers -------------------------------------------------------------------------------

    def _referrers(self, digest: str) -> list[Descriptor]:
        url = f"{self._registry.prefix}://{self._at.registry}/v2/{self._at.api_prefix}/referrers/{digest}"
        answer = self._registry.do_request(url, headers={"Accept": INDEX}, stream=True)
        if answer.status_code == 404:
            answer.close()
            return self._fallback(digest)
        return _entries(self._body(answer, MAX_MANIFEST_BYTES))

    def _fallback(self, digest: str) -> list[Descriptor]:
        try:
            return _entries(self._get(_fallback_tag(digest), (INDEX,)))
        except ShippingError:
            return []

    def _tell_referrers(self, subject: Descriptor, told: list[Descriptor]) -> None:
        """Where the registry has no referrers API the pusher keeps the index."""
        url = f"{self._registry.prefix}://{self._at.registry}/v2/{self._at.api_prefix}/referrers/"
        answer = self._registry.do_request(url + subject["digest"], headers={"Accept": INDEX})
        if answer.status_code != 404 or not told:
            return
        known = {one["digest"]: one for one in (*self._fallback(subject["digest"]), *told)}
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": list(known.values())}
        self._put(index, _fallback_tag(subject["digest"]), INDEX)

    @contextmanager
    def _trouble(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ShippingError, UsageError):
            raise
        except Exception as error:  # requests' and oras' own, and what odd JSON makes us raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise ShippingError(
                f"{what} {self.url}: {reason}.",
                "Is it there, and may you? `docker login` says who.",
            ) from None


def _manifest(
    kind: str, layers: list[Descriptor], subject: Descriptor | None = None, suffix: str = ""
) -> dict[str, Any]:
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": kind,
        "config": _descriptor(EMPTY, b"{}"),
        "layers": layers,
    }
    if subject is not None:
        manifest |= {"subject": subject, "annotations": {SUFFIX: suffix}}
    return manifest


def _descriptor(kind: str, data: bytes) -> Descriptor:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return {"mediaType": kind, "digest": digest, "size": len(data)}


def _bytes(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, separators=(",", ":"), sort_keys=True).encode()


def _entries(raw: bytes) -> list[Descriptor]:
    return [one for one in canonical.loads(raw)["manifests"] if isinstance(one, dict)]


def _fallback_tag(digest: str) -> str:
    return digest.replace(":", "-")


def _check(content: bytes, digest: str) -> None:
    if digest != f"sha256:{hashlib.sha256(content).hexdigest()}":
        raise ShippingError(
            f"The registry gave other bytes than {digest[:24]}.", "Don't trust it; pull again."
        )


def _bounded_waits() -> Any:
    adapters = needed("requests.adapters")

    class Bounded(adapters.HTTPAdapter):  # type: ignore[misc, name-defined]
        def send(self, request: Any, **options: Any) -> Any:
            options["timeout"] = options.get("timeout") or _TIMEOUT
            return super().send(request, **options)

    return Bounded()
