"""``patcher evaluate``: what a model still answers, without and with patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from patcher.cli.make import data_options
from patcher.cli.options import existing_file, json_option
from patcher.cli.output import percent, print_json, table
from patcher.cli.progress import shown_progress

_METRICS = ("efficacy", "generalization", "specificity", "retained")


@click.command()
@data_options
@click.option(
    "--patch",
    "patches",
    multiple=True,
    type=existing_file,
    metavar="P.st",
    help="A patch to fold in; again for more, the bottom of the stack first.",
)
@click.option(
    "--retain",
    type=existing_file,
    metavar="R.jsonl",
    help="Other facts, which must stay.",
)
@click.option(
    "--ppl", type=existing_file, metavar="TEXT", help="Plain text to measure perplexity on."
)
@click.option(
    "--dtype",
    default="bfloat16",
    show_default=True,
    help="The type that the weights are served in: they are rounded to it.",
)
@json_option
def evaluate(as_json: bool, verbose: bool, **wishes: Any) -> None:
    """Measure the base and the patched weights as they would be served.

    Fractions of prompts still answered with the target: of the facts to forget (efficacy) and
    their paraphrases (generalization), where low is good; of their neighbours (specificity)
    and of other facts (retained), where high is good.
    """
    from patcher.evaluation import evaluate as run

    with shown_progress(verbose) as progress:
        document = run(**_given(wishes), progress=progress).as_dict()
    if as_json:
        print_json(document)
    else:
        _print_report(document)


def _given(wishes: Mapping[str, Any]) -> dict[str, Any]:
    # An option that wasn't given leaves the default to the function.
    return {name: value for name, value in wishes.items() if value is not None}


def _print_report(document: Mapping[str, Any]) -> None:
    sides = ("base", "patched")
    rows = [(name, *(_fraction(document, side, name) for side in sides)) for name in _METRICS]
    rows.append(("perplexity", *(_perplexity(document[side]) for side in sides)))
    click.echo(f"{document['facts']} facts, {document['known']} of them known to the base.")
    table(["", ">base", ">patched"], rows)


def _fraction(document: Mapping[str, Any], side: str, name: str) -> str:
    count = document["counts"][side][name]
    return f"{percent(document[side][name])} ({count['yes']} of {count['of']})"


def _perplexity(figures: Mapping[str, Any]) -> str:
    value = figures["perplexity"]
    return "–" if value is None else f"{value:.3f}"
