"""``patcher push`` and ``patcher pull``: patches to and from registries, the Hub, and URLs."""

from __future__ import annotations

from pathlib import Path

import click

from patcher.cli.options import (
    existing_file,
    json_option,
    output_option,
)
from patcher.cli.output import facts, note, print_json, size
from patcher.errors import UsageError

insecure_option = click.option(
    "--insecure", is_flag=True, help="Plain http to a host that isn't this machine."
)


@click.command()
@click.argument("path", type=existing_file, metavar="P.st")
@click.argument("target", metavar="URL")
@click.option(
    "--signature",
    "signatures",
    multiple=True,
    type=existing_file,
    metavar="P.st.sig",
    help="A signature of it; those beside the file go with it unasked.",
)
@click.option("--report", type=existing_file, help="A report to go with it, like a page of HTML.")
@insecure_option
@json_option
def push(
    path: Path,
    target: str,
    signatures: tuple[Path, ...],
    report: Path | None,
    insecure: bool,
    as_json: bool,
) -> None:
    """Send a patch with its signatures to an OCI registry, the Hugging Face Hub or any URL.

    \b
      patcher push forget.st oci://registry.example/team/forget:v1
      patcher push forget.st hf://team/patches/forget.st
      patcher push forget.st s3://bucket/forget.st

    Whoever can read it there learns what a patch file reveals (docs/threat-model.md).
    """
    from patcher.shipping import push as send

    where = send(path, target, signatures=signatures, report=report, insecure=insecure)
    if as_json:
        print_json({"path": str(path), "url": where, "id": where.rpartition("=")[2]})
    else:
        facts([("sent to", where)])


@click.command()
@click.argument("source", metavar="URL")
@output_option("The patch file; signatures and reports are written beside it.")
@click.option("--id", "pin", metavar="ID", help="The whole id that it must have.")
@insecure_option
@json_option
def pull(source: str, output: Path, pin: str | None, insecure: bool, as_json: bool) -> None:
    """Fetch a patch with its signatures, and check that it is a sound one.

    With --id, or #sha256=… at the URL's end, nothing else is taken.
    """
    from patcher.shipping import pull as fetch
    from patcher.shipping.moving import save

    if pin is not None and (len(pin) != 64 or any(c not in "0123456789abcdef" for c in pin)):
        raise UsageError(f"{pin!r} is no whole id.", "It has 64 hexadecimal digits.")
    patch, beside = fetch(source, pin=pin, insecure=insecure)
    others = [str(one) for one in save(patch, beside, output)]
    if as_json:
        print_json(
            {"id": patch.id, "path": str(output), "bytes": len(patch.data), "beside": others}
        )
    else:
        facts([("file", f"{output}: sound, {size(len(patch.data))}"), ("id", patch.id)])
        for one in others:
            note(f"also {one}")
