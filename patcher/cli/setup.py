"""Commands for setting patcher up."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import get_completion_class

from patcher.cli.options import address_options, json_option, read_token
from patcher.cli.output import note, print_json, table


@click.command()
@address_options(required=False)
@json_option
def doctor(engine: str | None, token: str | None, token_file: Path | None, as_json: bool) -> None:
    """Tell what is installed, what is missing and what to set.

    With --engine also whether every process of that engine has the plugin. Exit code 0 if all
    is well, 1 if this installation can't work, 7 if the engine can't be reached or lacks the
    plugin, 8 if only some of its processes have it, 10 if it refuses the token.
    """
    from patcher.doctor import examine

    report = examine(engine, read_token(token, token_file))
    if as_json:
        print_json(report.as_dict())
    else:
        table(["", "what", "found"], [(c.state, c.name, c.found) for c in report.checks])
        for check in report.checks:
            if check.cure:
                note(f"{check.name}: {check.cure}")
    raise click.exceptions.Exit(report.exit_code)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@click.pass_context
def completion(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print the script that completes `patcher` in a shell.

    \b
    bash: echo 'eval "$(patcher completion bash)"' >> ~/.bashrc
    zsh:  echo 'eval "$(patcher completion zsh)"' >> ~/.zshrc
    fish: patcher completion fish > ~/.config/fish/completions/patcher.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ctx.find_root().command, {}, "patcher", "_PATCHER_COMPLETE").source()
    if as_json:
        print_json({"shell": shell, "script": script})
    else:
        click.echo(script)
