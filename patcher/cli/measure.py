"""``patcher evaluate``: what a model still answers, without and with patches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from patcher.cli.options import data_options, existing_file, json_option, only_given
from patcher.cli.output import note, note_error, percent, print_json, table
from patcher.cli.progress import shown_progress
from patcher.errors import UsageError

_FORMATS = "auto|jsonl|counterfact|zsre|mquake|rwku|tofu"


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
    default="auto",
    show_default=True,
    help="The type that the weights are served in: they are rounded to it. By default the "
    "patches', else the checkpoint's.",
)
@click.option(
    "--format",
    default="auto",
    show_default=True,
    metavar=_FORMATS,
    help="The format of the forget set; auto recognises it by its fields.",
)
@click.option(
    "--retain-format", default="auto", show_default=True, metavar=_FORMATS, help="That of --retain."
)
@click.option(
    "--probes",
    default="none",
    show_default=True,
    metavar="all|none|NAME,…",
    help="Further figures: probability, rank, templates, prefixes, chat, sampling, says, multihop, "
    "truth, lens, layers, same_relation, same_subject, quantise, relearn.",
)
@click.option(
    "--lm-eval",
    metavar="TASK,…",
    help="Tasks of lm-evaluation-harness to run on both sets of weights, where it is installed.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of resamples and samples.")
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="Write all of it as one page that opens offline.",
)
@click.option(
    "--with-texts",
    is_flag=True,
    help="Let the page, or --json, name the facts by their texts and say what the model replies.",
)
@json_option
def evaluate(
    as_json: bool,
    verbose: bool,
    report: Path | None,
    with_texts: bool,
    lm_eval: str | None,
    **wishes: Any,
) -> None:
    """Measure the base and the patched weights as they would be served.

    Fractions of prompts still answered with the target: of the facts to forget (efficacy) and
    their paraphrases (generalization), where low is good; of their neighbours (specificity)
    and of other facts (retained), where high is good. Intervals are of 95 %.
    """
    if with_texts and report is None and not as_json:
        raise UsageError(
            "--with-texts is for a page or a document.",
            "Give --report FILE.html or --json with it.",
        )
    from patcher.patch.files import check_place

    if report is not None:
        check_place(report)
    from patcher.evaluation import evaluate as run
    from patcher.evaluation import write_page

    tasks = [] if lm_eval is None else lm_eval.split(",")
    with shown_progress(verbose) as progress:
        found = run(**only_given(wishes), lm_eval=tasks, progress=progress)
    failure: UsageError | None = None
    if report is not None:  # first, as whoever reads the output may go away
        try:
            write_page(report, {"this evaluation": found}, with_texts=with_texts)
        except UsageError as error:
            failure = error
    document = found.as_dict(with_texts=with_texts)
    if as_json:
        print_json(document)
    else:
        _print_report(document)
    if failure is not None:
        note_error(failure)
        raise click.exceptions.Exit(failure.exit_code)


def _print_report(document: Mapping[str, Any]) -> None:
    from patcher.evaluation.lines import probe_lines, usual_lines

    click.echo(f"{document['facts']} facts, {document['known']} of them known to the base.")
    lines = [*usual_lines(document), *probe_lines(document)]
    table(
        ["", ">base", ">patched", ">95 % interval"],
        [
            (
                f"{line.probe} {line.name}".strip(),
                _cell(line.base),
                _cell(line.patched),
                _interval(line.patched),
            )
            for line in lines
        ],
    )
    for task in (document["lm_eval"] or {}).get("base") or {}:
        before, after = (document["lm_eval"][side][task] for side in ("base", "patched"))
        for name, value in before.items():
            click.echo(f"{task} {name}: {value:.4g} → {after.get(name, float('nan')):.4g}")
    for name, why in document["skipped"].items():
        note(f"{name} was not asked: {why}.")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return f"{percent(value['share'])} ({value['yes']} of {value['of']})"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _interval(value: Any) -> str:
    found = value.get("interval") if isinstance(value, Mapping) else None
    return "" if found is None else f"{percent(found['low'])} – {percent(found['high'])}"
