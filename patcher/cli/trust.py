"""Commands about who made a patch: keys, signatures, and whether they are enough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from patcher.cli.options import existing_file, json_option, password_option, patch_file, read_secret
from patcher.cli.output import facts, print_json, short
from patcher.errors import UsageError

if TYPE_CHECKING:
    from patcher.signing import TrustPolicy


@click.command()
@click.argument("name", type=click.Path(path_type=Path))
@password_option
@json_option
def keygen(name: Path, password_file: Path | None, as_json: bool) -> None:
    """Make a key pair for signing patches: NAME.key and NAME.pub.

    The private key is for its owner alone (mode 0600), and encrypted with --password-file. The
    fingerprint is what a trust policy revokes a key by.
    """
    from patcher.signing import generate

    password = None if password_file is None else read_secret(password_file, "password")
    private, public, fingerprint = generate(name, password)
    if as_json:
        print_json({"key": str(private), "public": str(public), "fingerprint": fingerprint})
    else:
        facts([("private key", private), ("public key", public), ("fingerprint", fingerprint)])


@click.command()
@click.argument("paths", nargs=-1, required=True, type=existing_file, metavar="P.st…")
@click.option("--key", type=existing_file, help="Private key in PEM, as `patcher keygen` makes.")
@password_option
@click.option(
    "--certificate", type=existing_file, help="The certificate of --key, in PEM, to go with it."
)
@click.option(
    "--chain",
    multiple=True,
    type=existing_file,
    help="A certificate between that one and the root; again for more.",
)
@click.option("--keyless", is_flag=True, help="Sign as who you are at Sigstore; needs the network.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The signature's file. By default beside the patch: P.st.NAME.sig, NAME from the key.",
)
@json_option
def sign(
    paths: tuple[Path, ...],
    key: Path | None,
    password_file: Path | None,
    certificate: Path | None,
    chain: tuple[Path, ...],
    keyless: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Sign patch files as OpenSSF Model Signing does: a Sigstore bundle over the file's bytes.

    The files are checked first. Whoever reviews a patch signs it too: each signature is a file
    of its own, and `patcher apply` sends those that lie beside the patch.
    """
    from patcher.patch import Patch
    from patcher.signing import Identity
    from patcher.signing import sign as make

    if keyless == (key is not None):
        raise UsageError("Say who signs.", "Give --key KEY, or --keyless.")
    if output is not None and len(paths) > 1:
        raise UsageError("-o names one file, and there are several.", "Leave -o out.")
    if output is not None and any(_same_file(output, one) for one in (*paths, key, certificate)):
        raise UsageError(f"-o {output} would write over what it signs.", "Name another file.")
    password = None if password_file is None else read_secret(password_file, "password")
    identity = Identity(key, password, certificate, chain)
    name = "keyless" if key is None else key.name.removesuffix(".key").removesuffix(".pem")
    patches = [Patch.read(path) for path in paths]
    signed = []
    for path, patch in zip(paths, patches, strict=True):
        out = output or path.with_name(f"{path.name}.{name}.sig")
        make(patch.data, out, identity)
        signed.append({"id": patch.id, "path": str(path), "signature": str(out)})
    if as_json:
        print_json({"signed": signed})
    else:
        facts([(one["signature"], f"signs {short(one['id'])}") for one in signed])


def _same_file(output: Path, other: Path | None) -> bool:
    return other is not None and output.exists() and output.samefile(other)


@click.command("verify-file")
@click.argument("path", type=patch_file, metavar="P.st|URL")
@click.option(
    "--signature",
    "signatures",
    multiple=True,
    type=existing_file,
    metavar="P.st.sig",
    help="A signature of it; those beside it are looked at unasked.",
)
@click.option("--trust", type=existing_file, metavar="POLICY.toml", help="A trust policy.")
@click.option("--public-key", type=existing_file, metavar="K.pub", help="Or one key alone.")
@json_option
def verify_file(
    path: Path,
    signatures: tuple[Path, ...],
    trust: Path | None,
    public_key: Path | None,
    as_json: bool,
) -> None:
    """Check that a patch file is signed by whom it must be; no engine needed, and no network.

    Exit code 5, and the rule that refuses, where it isn't. With --public-key a certificate, or a
    head of the ledger, that was signed with --key is checked in the same way.
    """
    from patcher.patch import Patch
    from patcher.signing import bundles_of

    if (trust is None) == (public_key is None):
        raise UsageError("Say whose signature it needs.", "Give --trust or --public-key.")
    if public_key is not None and _is_json(path):
        _verify_statement(path, public_key, as_json)
        return
    policy = _policy(trust, public_key)
    patch = Patch.read(path)
    given = [bundle for _, bundle in bundles_of([(patch.id, path)], signatures)]
    signers = policy.check(patch, given)
    document = {
        "id": patch.id,
        "path": str(path),
        "ok": True,
        "signers": signers,
        "signatures": len(given),
    }
    if as_json:
        print_json(document)
    else:
        told = ", ".join(signers) or "nobody, and the policy takes it unsigned"
        facts([("file", f"{path}: sound"), ("id", patch.id), ("signed by", told)])


def _policy(trust: Path | None, public_key: Path | None) -> TrustPolicy:
    from patcher.signing import TrustPolicy

    if trust is not None:
        return TrustPolicy.read(trust)
    assert public_key is not None
    return TrustPolicy.of_key(public_key)


def _is_json(path: Path) -> bool:
    """Whether it is a statement: a patch file's first byte is a length's, and never a brace."""
    with path.open("rb") as file:
        return file.read(1) == b"{"


def _verify_statement(path: Path, public_key: Path, as_json: bool) -> None:
    from patcher.signing import opened
    from patcher.signing.envelope import MAX_ENVELOPE_BYTES

    with path.open("rb") as file:
        statement = opened(file.read(MAX_ENVELOPE_BYTES + 1), public_key)
    if as_json:
        print_json({"path": str(path), "ok": True, "statement": statement})
        return
    subjects = [(one["name"], one["digest"]["sha256"]) for one in statement["subject"]]
    facts([("file", f"{path}: signed by {public_key.stem}"),
           ("states", statement["predicateType"]), *subjects])  # fmt: skip
