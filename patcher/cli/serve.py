"""``patcher serve``: our few options, and everything else is vLLM's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from patcher.cli.options import existing_file, json_option
from patcher.cli.output import print_json
from patcher.errors import UsageError


class PassThrough(click.Command):
    """Takes its own options out of the words, wherever they stand, and leaves the rest in order.

    click's own way of ignoring unknown options reads ``-dph`` as ``-d -p -h``.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Sort the words, then parse as usual."""
        own, rest = self._sort(ctx, list(args))
        return super().parse_args(ctx, [*own, "--", *rest])

    def _sort(self, ctx: click.Context, words: list[str]) -> tuple[list[str], list[str]]:
        takes_value: dict[str, bool] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option):
                valued = not (param.is_flag or param.count)
                takes_value |= dict.fromkeys(param.opts, valued)
        own: list[str] = []
        rest: list[str] = []
        while words:
            word = words.pop(0)
            if word == "--":
                return own, rest + words
            if word in takes_value:
                own.append(word)
                if takes_value[word] and words:
                    own.append(words.pop(0))
            elif takes_value.get(word.partition("=")[0]) and "=" in word:
                own.append(word)
            else:
                rest.append(word)
        return own, rest


@click.command(cls=PassThrough)
@click.argument("model")
@click.argument("vllm_args", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM'S OPTIONS…]")
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the patches, the stack and the ledger. By default one for each model "
    "under ~/.local/state/vllm-patcher.",
)
@click.option(
    "--token-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The admin token's file, made at the first start. By default in the state folder.",
)
@click.option(
    "--trust",
    type=existing_file,
    metavar="POLICY.toml",
    help="Whose signatures a patch needs; read at every start (docs/trust.md).",
)
@click.option("--no-restore", is_flag=True, help="Serve the base: leave the committed stack out.")
@json_option
def serve(
    model: str,
    vllm_args: tuple[str, ...],
    state: Path | None,
    token_file: Path | None,
    trust: Path | None,
    no_restore: bool,
    as_json: bool,
) -> None:
    """Start vLLM's OpenAI server with the plugin.

    MODEL comes first; every option that is not listed here goes to vLLM as it stands:

    \b
      patcher serve Qwen/Qwen3-4B --port 8001 --max-model-len 8192

    With --json the one document (pid, state, token_file) is printed before vLLM starts, and
    vLLM's log goes to stderr.
    """
    from patcher.engine.serve import serve as start
    from patcher.engine.settings import Settings

    if model.startswith("-"):
        raise UsageError("The model is missing.", "Write it first: patcher serve MODEL [options].")
    if as_json:
        settings = Settings.read(model)
        folder = state or settings.state
        token = token_file or (folder / "token" if state else settings.token_file)
        print_json(
            {"pid": os.getpid(), "model": model, "state": str(folder), "token_file": str(token)}
        )
        sys.stdout.flush()
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    start(
        model,
        list(vllm_args),
        state=state,
        token_file=token_file,
        no_restore=no_restore,
        trust=trust,
    )
