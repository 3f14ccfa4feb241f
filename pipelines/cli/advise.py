"""`headrace advise RUN`: what would help most, measured on what the run has kept."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from headrace.cache.count_text import count_text
from headrace.pipelines.cli.completion import complete_runs
from headrace.pipelines.cli.options import JsonOption, QuietOption, print_json, progress_console
from headrace.pipelines.console import make_console

if TYPE_CHECKING:
    from headrace.pipelines.advice.decide import Advice


def advise_command(
    run: Annotated[
        Path,
        typer.Argument(
            help="A finished run: the recipe that made it, or its directory, headrace-runs/NAME.",
            autocompletion=complete_runs,
        ),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Another run on the same backbones, given likewise: say also how far the images "
            "of the run lie from those of this one."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes; default: one per core.", min=1)
    ] = None,
    quiet: QuietOption = False,
    json_output: JsonOption = False,
) -> None:
    """Say what would help most: a head, deeper training or more images, with the evidence.

    Trains small heads on subsets of the cached features, once; no image is read.

    Example: headrace advise recipe.yaml
    """
    from headrace.pipelines.advice.advise_run import advise_run
    from headrace.pipelines.advice.decide import advice_summary

    advice = advise_run(
        run, reference=reference, console=progress_console(quiet=quiet), workers=workers
    )
    if json_output:
        print_json("advise", **advice_summary(advice))
    else:
        show_advice(make_console(), advice)


def show_advice(console: Console, advice: "Advice") -> None:
    """Print the advice, its reasons, and the numbers behind them."""
    console.print(advice.sentence, style="bold")
    for reason in advice.reasons:
        console.print(f"- {reason}")
    evidence = advice.evidence
    if evidence is None:
        return
    console.print()
    if evidence.curve:
        table = Table(title="Learning curve", title_justify="left")
        table.add_column("images", justify="right")
        table.add_column("error", justify="right")
        for images, error in zip(evidence.curve["images"], evidence.curve["error"], strict=True):
            table.add_row(f"{images:,.0f}", f"{error * 100:.2f} %")
        # Dim, because these were not measured.
        for times, error_ahead in sorted(evidence.ahead.items()):
            table.add_row(
                f"{times * evidence.curve['images'][-1]:,.0f}",
                f"{error_ahead.value * 100:.2f} % ({error_ahead.low * 100:.2f} to "
                f"{error_ahead.high * 100:.2f}), by the fit",
                style="dim",
            )
        console.print(table)
    if evidence.scores:
        console.print(_scores_table(evidence.scores))


def _scores_table(scores: tuple[dict[str, Any], ...]) -> Table:
    table = Table(
        title=f"Feature sets, scored on {count_text(scores[0]['images'], 'image')}",
        title_justify="left",
    )
    table.add_column("features", no_wrap=True)
    for column in ("width", "LogME", "H-score", "NCE", "neighbours", "Bayes error"):
        table.add_column(column, justify="right")
    for row in scores:
        # None: the task or the feature set does not allow the score, such as NCE without logits.
        bounds = (
            "–" if row["bayes_low"] is None else f"{row['bayes_low']:.3f}–{row['bayes_high']:.3f}"
        )
        numbers = [
            "–" if row[key] is None else f"{row[key]:.3f}"
            for key in ("logme", "h_score", "nce", "neighbours")
        ]
        table.add_row(row["name"], f"{row['width']:,}", *numbers, bounds)
    return table
