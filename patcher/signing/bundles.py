"""OpenSSF Model Signing bundles of patch files: made, found, and checked.

A bundle is a Sigstore bundle (JSON) around an in-toto statement. For a single file its only
resource is named ``.``, with the SHA-256 of the file's bytes, which is the patch's id: so the
name of the file doesn't matter, and a bundle says by itself which patch it is for.
"""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import TrustError, UsageError
from ..patch import canonical, files
from .keys import fingerprint, needed

MAX_BUNDLE_BYTES = 1 << 18  # keyless ones carry certificates and a log's proof: some 10 kB
SUFFIX = ".sig"


class Verifier(Protocol):
    """Checks bundles for one signer."""

    def signed(self, data: bytes, bundle: bytes) -> bool:
        """Whether the signer signed exactly these bytes with this bundle."""


@dataclass(frozen=True)
class Identity:
    """Who signs: a private key, a key with its certificate, or (neither) a keyless identity.

    ``chain``: intermediate certificates, the signing one's issuer first.
    """

    key: Path | None = None
    password: bytes | None = None
    certificate: Path | None = None
    chain: Sequence[Path] = ()


def sign(data: bytes, out: Path, identity: Identity) -> None:
    """Write a bundle that signs these bytes, which are a patch file's.

    Raises:
        UsageError: a key that can't be read, a wrong password, a place that can't be written,
            ``model_signing`` isn't installed.
        TrustError: the keyless service gave no signature.
    """
    signing = needed("model_signing.signing")
    try:
        config = signing.Config().set_hashing_config(_hashing())
        if identity.certificate is not None:
            config.use_certificate_signer(
                private_key=identity.key,
                signing_certificate=identity.certificate,
                # model_signing 1.1 can't read an empty chain; the certificate itself is no harm.
                certificate_chain=list(identity.chain) or [identity.certificate],
            )
        elif identity.key is not None:
            config.use_elliptic_key_signer(private_key=identity.key, password=identity.password)
        else:
            config.use_sigstore_signer()
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"Can't sign with {identity.key or 'that identity'}: {_line(error)}.",
            "Give an elliptic curve key in PEM, and its password with --password-file.",
        ) from None
    with tempfile.TemporaryDirectory(prefix="patcher-") as folder:
        file, made = Path(folder) / "patch", Path(folder) / "bundle"
        try:
            file.write_bytes(data)  # what was checked: no link to it, and not what it is by now
            config.sign(file, made)
        except Exception as error:  # of many libraries below, the network's among them
            raise TrustError(
                f"No signature was made: {_line(error)}.", "Try again, or sign with --key."
            ) from error
        files.write(out, made.read_bytes())


def beside(path: Path) -> list[Path]:
    """The bundles that lie beside a patch file: ``P.st.sig``, ``P.st.alice.sig`` …, sorted."""
    return sorted(
        one
        for one in path.parent.glob("*" + SUFFIX)
        if one.name.startswith(f"{path.name}.") and one.is_file()
    )


def read_bundle(path: Path) -> bytes:
    """A bundle's bytes.

    Raises:
        UsageError: no such file, or none that can be a bundle.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BUNDLE_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"Can't read {path}: {error.strerror}.", "Name a file that `patcher sign` made."
        ) from None
    if bundle_subject(data) is None:
        raise UsageError(
            f"{path} is no signature of a patch.", "Name one that `patcher sign` made."
        )
    return data


def bundle_subject(bundle: bytes) -> str | None:
    """The id of the patch that a bundle says it is for (unchecked), or None where it is no bundle.

    Only what OpenSSF Model Signing writes for a single file is taken: one resource, by SHA-256.
    """
    try:
        if len(bundle) > MAX_BUNDLE_BYTES:
            return None
        envelope = canonical.plain(canonical.loads(bundle))["dsseEnvelope"]
        payload = canonical.loads(base64.b64decode(envelope["payload"], validate=True))
        (resource,) = payload["predicate"]["resources"]
        found = resource["digest"] if resource["name"] == "." else None
        usable = resource["algorithm"] == "sha256" and isinstance(found, str) and len(found) == 64
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
        return None
    return found if usable else None


def normalised(bundle: bytes) -> bytes:
    """A bundle as canonical JSON: with other white space or order it isn't another signature."""
    return canonical.dumps(canonical.loads(bundle))


def by_subject(given: Iterable[bytes]) -> dict[str, list[bytes]]:
    """Bundles by the patch that they say they are for, each once; what is none is left out."""
    found: dict[str, dict[bytes, None]] = {}
    for bundle in given:
        subject = bundle_subject(bundle)
        if subject is not None:
            found.setdefault(subject, {})[normalised(bundle)] = None
    return {subject: list(bundles) for subject, bundles in found.items()}


def certificate_name(bundle: bytes) -> str | None:
    """The common name of the certificate that a bundle carries (unchecked), or None."""
    oid = needed("cryptography.x509").NameOID.COMMON_NAME
    try:
        (name,) = _certificate(bundle).subject.get_attributes_for_oid(oid)
    except Exception:  # of a stranger's certificate; whatever it is, it has no name
        return None
    return str(name.value)


def signing_key(bundle: bytes) -> str | None:
    """The fingerprint of the key that a bundle says it was made with; None where it says none.

    Once a verifier took the bundle it is the key's: ``model_signing`` checks hint and certificate.
    """
    try:
        material = canonical.loads(bundle)["verificationMaterial"]
        hint = (material.get("publicKey") or {}).get("hint")
        return str(hint) if hint else fingerprint(_certificate(bundle).public_key())
    except Exception:  # as above
        return None


def _certificate(bundle: bytes) -> Any:
    """The signing certificate in a bundle; raises what odd JSON and odd certificates raise."""
    x509 = needed("cryptography.x509")
    material = canonical.loads(bundle)["verificationMaterial"]
    if "certificate" in material:  # keyless bundles of today
        raw = material["certificate"]["rawBytes"]
    else:
        raw = material["x509CertificateChain"]["certificates"][0]["rawBytes"]
    return x509.load_der_x509_certificate(base64.b64decode(raw))


class BundleVerifier:
    """Checks bundles with one of model_signing's verifiers.

    ``config`` holds the keys as they were when it was made. ``common_name``: what the signing
    certificate must be called.
    """

    def __init__(self, config: Any, common_name: str | None = None) -> None:
        self._config = config
        self._name = common_name

    def signed(self, data: bytes, bundle: bytes) -> bool:
        """Whether the signer signed exactly these bytes with this bundle."""
        if self._name is not None and certificate_name(bundle) != self._name:
            return False
        with tempfile.TemporaryDirectory(prefix="patcher-") as folder:
            file, signature = Path(folder) / "patch", Path(folder) / "bundle"
            file.write_bytes(data)
            signature.write_bytes(bundle)
            try:
                self._config.set_hashing_config(_hashing()).verify(file, signature)
            except Exception:  # of many libraries below; whatever it is, it is no signature
                return False
        return True


def by_key(path: Path) -> BundleVerifier:
    """Checks with a public key."""
    return BundleVerifier(_verifying().use_elliptic_key_verifier(public_key=path))


def by_certificates(paths: Iterable[Path], common_name: str | None) -> BundleVerifier:
    """Checks with the certificates that a signing one must go back to.

    As ``model_signing`` does, without looking at whether the signing one has expired since.
    """
    config = _verifying().use_certificate_verifier(certificate_chain=list(paths))
    return BundleVerifier(config, common_name)


def by_identity(identity: str, issuer: str, trust_config: Path | None) -> BundleVerifier:
    """Checks keyless signatures; offline with a Sigstore trust configuration's file."""
    config = _verifying().use_sigstore_verifier(
        identity=identity, oidc_issuer=issuer, trust_config=trust_config
    )
    return BundleVerifier(config)


def _verifying() -> Any:
    return needed("model_signing.verifying").Config()


def _hashing() -> Any:
    return needed("model_signing.hashing").Config().use_file_serialization()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200].rstrip(".")


def bundles_of(
    patches: Iterable[tuple[str, Path | None]], named: Iterable[Path] = ()
) -> list[tuple[str, bytes]]:
    """The bundles that go with patches, each with the id of its patch, none twice.

    Args:
        patches: ids, and where a patch was read from a file, that file: what lies beside it.
        named: more bundles, each of one of those patches.

    Raises:
        UsageError: a named file is no bundle, or is of none of the patches.
    """
    patches = list(patches)
    ids = {patch_id for patch_id, _ in patches}
    found: dict[tuple[str, bytes], None] = {}
    for patch_id, path in patches:
        for one in [] if path is None else beside(path):
            with one.open("rb") as file:
                data = file.read(MAX_BUNDLE_BYTES + 1)
            if bundle_subject(data) == patch_id:  # what lies there may be anybody's
                found[patch_id, data] = None
    for one in named:
        data = read_bundle(one)
        subject = bundle_subject(data)
        if subject not in ids:
            raise UsageError(
                f"{one} signs {str(subject)[:12]}, which is none of the patches.",
                "Was the patch made again after it was signed? Sign it again.",
            )
        found[str(subject), data] = None
    return list(found)
