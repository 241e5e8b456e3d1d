"""``patcher compute``: from a forget set to a patch file; no engine needed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from patcher.cli.options import (
    Command,
    data_options,
    existing_file,
    json_option,
    only_given,
    output_option,
    stack_options,
)
from patcher.cli.output import facts, note_error, print_json, size, table
from patcher.cli.progress import shown_progress
from patcher.errors import BarsNotMetError, UsageError

if TYPE_CHECKING:
    from patcher.unlearn import ComputeResult

_BARS = {
    "max_efficacy": "Of the known facts, at most this share may still be answered.",
    "max_leaked": "Of the known facts, at most this share may turn up in 12 greedy tokens.",
    "max_generalization": "Of their answered other wordings, at most this share.",
    "min_specificity": "Of neighbours, and of other prompts, at least this share must stay.",
    "min_retained": "Of the known facts of --retain, at least this share must stay.",
    "max_ppl_ratio": "Perplexity may rise to at most this many times the base's.",
}


def bar_options(command: Command) -> Command:
    """The bars; the function gets those that were given as ``bars``."""

    @functools.wraps(command)
    def given(**options: Any) -> Any:
        bars = {name: options.pop(name) for name in _BARS}
        return command(**options, bars=only_given(bars))

    wrapped: Any = given
    for name, text in reversed(_BARS.items()):
        word = "--" + name.replace("_", "-")
        wrapped = click.option(word, type=float, metavar="F", help=text)(wrapped)
    return cast(Command, wrapped)


@click.command()
@data_options
@output_option("The patch file to write.", "P.st")
@click.option(
    "--method",
    default="zero",
    show_default=True,
    metavar="NAME",
    help="How the edit is computed; `patcher methods` lists them.",
)
@click.option(
    "--as-published", is_flag=True, help="The method zero as its paper's code has it, to compare."
)
@click.option(
    "--orthogonal",
    is_flag=True,
    help="The method zero with its paper's orthogonality, on the facts.",
)
@click.option(
    "--augment", is_flag=True, help="Learn from the other wordings and generated prefixes too."
)
@click.option(
    "--layers", default="auto", show_default=True, metavar="auto|9,10,11", help="Which to edit."
)
@click.option(
    "--reference",
    metavar="FILE|self",
    help="Plain text like what must be preserved, to estimate its statistics on; `self`: text "
    "that the model writes.",
)
@click.option(
    "--target",
    metavar="eos|suppress|TEXT",
    help="What is to come instead: the end of the answer, anything but the answer, or this text.",
)
@click.option(
    "--retain",
    type=existing_file,
    metavar="R.jsonl",
    help="Facts that must stay, in the same form; they are protected and checked.",
)
@bar_options
@click.option(
    "--dtype", default="auto", show_default=True, help="The type that the weights are served in."
)
@click.option(
    "--no-resume",
    "resume",
    flag_value=False,
    default=True,
    help="Begin anew, not where the same computation was interrupted.",
)
@click.option(
    "--ignore-memory", is_flag=True, help="Begin even where more memory is needed than there is."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--title", metavar="TEXT", help="A name for people; it stands in the file.")
@stack_options
@json_option
def compute(
    as_json: bool,
    verbose: bool,
    bars: Mapping[str, float],
    **wishes: Any,
) -> None:
    """Compute an edit and write it as a patch file.

    With bars (--max-efficacy …) the edit is checked on the weights as they will be served, and
    what misses a bar is solved for again. If one can't be met, the best edit is written
    nevertheless, and the exit code is 12.
    """
    _check_reference(wishes["reference"])
    from patcher.unlearn import Bars
    from patcher.unlearn import compute as run

    wanted = Bars(**bars)
    failure: BarsNotMetError | None = None
    with shown_progress(verbose) as progress:
        try:
            result = run(**only_given(wishes), bars=wanted, progress=progress)
        except BarsNotMetError as error:
            failure, result = error, error.result
    if as_json:
        print_json(result.as_dict())
    else:
        _print(result)
    if failure is not None:
        note_error(failure)
        raise click.exceptions.Exit(failure.exit_code)


def _check_reference(reference: str | None) -> None:
    if reference not in (None, "self") and not Path(str(reference)).is_file():
        raise UsageError(
            f"There is no file {reference!r} to refer to.", "Give a text file, or self."
        )


def _print(result: ComputeResult) -> None:
    facts(
        [
            ("patch", f"{result.path} ({size(result.bytes)})"),
            ("id", result.id),
            ("facts", f"{result.facts}, {result.known} of them known to the model"),
            ("modules", ", ".join(f"{n} (rank {r})" for n, r in result.modules.items())),
            ("took", f"{result.seconds:.1f} s"),
        ]
    )
    click.echo()
    facts(_effect(result.evaluation))
    bars = result.evaluation.get("bars")
    if bars:
        click.echo()
        table(
            ["bar", ">at", ">reached", ""],
            [
                (
                    name.replace("_", "-"),
                    f"{one['bar']:g}",
                    "–" if one["value"] is None else f"{one['value']:.4g}",
                    "met" if one["met"] else "MISSED",
                )
                for name, one in bars.items()
            ],
        )


def _effect(found: Mapping[str, Any]) -> list[tuple[str, object]]:
    # What the check on the rounded weights found, in words.
    wordings, others, kept = (found[n] for n in ("paraphrases", "others_unchanged", "preserved"))
    below = found.get("still_forgotten") or {"patched": 0, "base": 0, "of": 0}
    near = found.get("neighbours") or {"kept": 0, "base": 0}
    ratio = found["perplexity_ratio"]
    rows = [
        ("still answered", f"{found['answered']} of {found['facts']}"),
        ("in generated text", f"{found['leaked']['patched']} of {found['facts']}"),
        (
            "other wordings",
            f"{wordings['patched']} of {wordings['of']} (before {wordings['base']})",
        ),
        ("neighbours kept", f"{near['kept']} of {near['base']}"),
        ("others unchanged", f"{others['same']} of {others['of']}"),
        ("to be preserved", f"{kept['patched']} of {kept['of']} (before {kept['base']})"),
        ("still forgotten", f"{below['patched']} of {below['of']} (before {below['base']})"),
        ("perplexity", "–" if ratio is None else f"{round(100 * (ratio - 1), 2) + 0.0:+.2f} %"),
    ]
    return [(name, text) for name, text in rows if " of 0" not in text]
