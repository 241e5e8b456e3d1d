"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from patcher.address import is_remote
from patcher.errors import UsageError
from patcher.protocol import IN_FLIGHT

Command = TypeVar("Command", bound=Callable[..., Any])

_LONGEST_SECRET_FILE = 4096  # bytes

existing_file = click.Path(exists=True, dir_okay=False, path_type=Path)


class PatchFile(click.ParamType[Path]):
    """A patch file's path; a URL is pulled to a temporary folder, with its signatures."""

    name = "patch"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path of the file, or of what was pulled."""
        if isinstance(value, str) and is_remote(value) and ctx is not None:
            return _pulled(value, ctx)
        path: Path = existing_file.convert(value, param, ctx)
        return path

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
        """Files, as for a path."""
        return existing_file.shell_complete(ctx, param, incomplete)


def _pulled(url: str, ctx: click.Context) -> Path:
    import tempfile

    from patcher.shipping import pull
    from patcher.shipping.moving import save

    patch, beside = pull(url)
    folder = ctx.with_resource(tempfile.TemporaryDirectory(prefix="patcher-"))
    path = Path(folder) / "patch.st"
    save(patch, beside, path)
    return path


patch_file = PatchFile()


def output_option(text: str, metavar: str | None = None) -> Callable[[Command], Command]:
    """``-o``: the file that a command writes, which it must be given."""
    return click.option(
        "-o",
        "--output",
        required=True,
        type=click.Path(dir_okay=False, path_type=Path),
        metavar=metavar,
        help=text,
    )


password_option = click.option(
    "--password-file", type=existing_file, help="File with the private key's password."
)


def json_option(command: Command) -> Command:
    """``--json``: one document on stdout; the function gets ``as_json``."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else."
    )(command)


def only_given(wishes: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given; the others are left to the function's own defaults."""
    return {name: value for name, value in wishes.items() if value is not None}


def address_options(*, required: bool) -> Callable[[Command], Command]:
    """``--engine``, ``--token``, ``--token-file``, as they were given."""
    url_help = "Root URL of the running engine, like http://127.0.0.1:8000."
    if not required:
        url_help += " Without it, only this machine is looked at."

    def decorate(command: Command) -> Command:
        for option in (
            click.option(
                "--token-file",
                type=existing_file,
                help="File with an admin token; stands in for --token.",
            ),
            click.option(
                "--token",
                envvar="PATCHER_TOKEN",
                show_envvar=True,
                metavar="TOKEN",
                help="Admin token of the plugin. Other users of the machine can read a command "
                "line: the variable or the file is better.",
            ),
            click.option(
                "--engine", envvar="PATCHER_ENGINE", show_envvar=True, metavar="URL", help=url_help
            ),
        ):
            command = option(command)
        return command

    return decorate


def engine_options(command: Command) -> Command:
    """The address of an engine; the function gets ``engine``, an open client."""

    @address_options(required=True)
    @functools.wraps(command)
    def connected(
        *args: Any, engine: str | None, token: str | None, token_file: Path | None, **rest: Any
    ) -> Any:
        from patcher.client import Engine

        if not engine:
            raise UsageError("No engine named.", "Give --engine URL, or set PATCHER_ENGINE.")
        with Engine(engine, read_token(token, token_file)) as connection:
            return command(*args, engine=connection, **rest)

    return cast(Command, connected)


def data_options(command: Command) -> Command:
    """The model, the forget set, and which of its facts count."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Say on stderr what is being done."),
        click.option("--device", default="auto", show_default=True, help="Where to compute."),
        click.option("--limit", type=click.IntRange(min=1), help="Take the first N facts."),
        click.option("--known-only", is_flag=True, help="Leave out what the model doesn't know."),
        click.option(
            "--forget",
            required=True,
            type=existing_file,
            metavar="F.jsonl",
            help="The forget set: JSON Lines with at least prompt (or messages) and target.",
        ),
        click.option(
            "--model",
            required=True,
            metavar="DIR_OR_HUB_ID",
            help="The model, as transformers names it.",
        ),
    ):
        command = option(command)
    return command


def stack_options(command: Command) -> Command:
    """What lies beneath a new patch; the function gets each as None where it wasn't given."""

    @functools.wraps(command)
    def given(
        *args: Any,
        on_top_of: tuple[str, ...],
        keep_forgotten: tuple[Path, ...],
        token: str | None,
        token_file: Path | None,
        **rest: Any,
    ) -> Any:
        below = {"on_top_of": on_top_of or None, "keep_forgotten": keep_forgotten or None}
        return command(*args, **below, token=read_token(token, token_file), **rest)

    wrapped: Any = given
    for option in (
        click.option("--token-file", type=existing_file, help="File with that token."),
        click.option(
            "--token",
            envvar="PATCHER_TOKEN",
            show_envvar=True,
            metavar="TOKEN",
            help="Admin token for --engine.",
        ),
        # Not from PATCHER_ENGINE: what is computed must not hang on a variable set for others.
        click.option(
            "--engine",
            metavar="URL",
            help="Compute on top of what is in force at this engine, or of what --on-top-of "
            "names of it.",
        ),
        click.option(
            "--keep-forgotten",
            multiple=True,
            type=existing_file,
            metavar="F.jsonl",
            help="A forget set of a patch beneath, to be guarded and checked; again for more.",
        ),
        click.option(
            "--on-top-of",
            multiple=True,
            metavar="P.st|ID",
            help="A patch that will be in force beneath this one; again for more, the bottom "
            "first. Ids need --engine. The new patch requires them.",
        ),
    ):
        wrapped = option(wrapped)
    return cast(Command, wrapped)


def change_options(command: Command) -> Command:
    """``--in-flight``, ``--reason`` and ``--guard`` of a change of the stack."""
    for option in (
        click.option(
            "--guard",
            "guards",
            multiple=True,
            type=existing_file,
            metavar="G.jsonl",
            help="Prompts and bounds that must hold on the live engine, or the change is taken "
            "back; again for more.",
        ),
        click.option(
            "--reason", default="", metavar="TEXT", help="Why, for the ledger. Not secret."
        ),
        click.option(
            "--in-flight",
            type=click.Choice(IN_FLIGHT),
            default="recompute",
            show_default=True,
            help="Running requests: recompute them under the new weights (none drops), let them "
            "end first, abort them, or let them continue over what the old ones cached.",
        ),
    ):
        command = option(command)
    return command


def read_token(token: str | None, token_file: Path | None) -> str | None:
    """The token, from its file if one is named."""
    if token_file is None:
        return token
    secret = read_secret(token_file, "token", "Name the file that `serve` made.")
    return secret.decode("ascii", "replace")


def read_secret(path: Path, what: str, cure: str = "Write it there, on one line.") -> bytes:
    """What a small file holds, without the white space around it.

    Raises :class:`UsageError` where that is nothing, or more than a secret would be.
    """
    with path.open("rb") as file:
        content = file.read(_LONGEST_SECRET_FILE + 1)
    if len(content) > _LONGEST_SECRET_FILE or not content.strip():
        raise UsageError(f"{path} holds no {what}.", cure)
    return content.strip()
