"""`headrace report`: a page about one run, or about two in comparison."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from headrace.cache.count_text import count_text
from headrace.pipelines.cli.completion import complete_runs
from headrace.pipelines.cli.options import JsonOption, flag, print_json
from headrace.pipelines.cli.predict import TrustOption
from headrace.pipelines.console import make_console


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="A finished run: the recipe that made it, or its directory, headrace-runs/NAME. "
            "With a second one, the page compares the two.",
            autocompletion=complete_runs,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The page to write; default: report.html in the run's directory, "
            "compare-OTHER.html for two.",
        ),
    ] = None,
    tables: Annotated[
        bool,
        flag(
            "--tables",
            help="Also write every table of the page as CSV and Parquet, in a folder beside it.",
        ),
    ] = False,
    pictures: Annotated[
        int | None,
        typer.Option(
            help="How many images of the map have a picture, of about 1.5 kB; default: 3000.", min=0
        ),
    ] = None,
    watts: Annotated[
        float | None,
        typer.Option(
            help="What your machine draws while it works, for the estimate of energy.", min=0
        ),
    ] = None,
    trust_code: TrustOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write one page to look at: leaderboard, map, mistakes as pictures, leaks. Or compare two.

    The page opens from the disk, without a server or a network.

    Example: headrace report recipe.yaml --tables
    """
    if len(runs) > 2:
        raise typer.BadParameter(
            f"{len(runs)} runs are given: expected one, or two to compare. Type: headrace report "
            f"{shlex.join(map(str, runs[:2]))}"
        )
    if len(runs) == 2 and (watts, pictures) != (None, None):
        raise typer.BadParameter(
            "two runs are given, and --watts and --pictures are for the page of one. Leave them out"
        )
    from headrace.pipelines.number_format import bytes_text
    from headrace.pipelines.report.build import MAX_PICTURES, write_report
    from headrace.pipelines.report.compare import write_comparison

    trusted = trust_code or ()
    if len(runs) == 2:
        report = write_comparison(runs[0], runs[1], out, tables=tables, trust_code=trusted)
    else:
        report = write_report(
            runs[0],
            out,
            tables=tables,
            watts=watts,
            pictures=MAX_PICTURES if pictures is None else pictures,
            trust_code=trusted,
        )
    if json_output:
        print_json("report", **vars(report))
        return
    lines = [
        f"Wrote {report.page} ({bytes_text(report.bytes)}). Open it in a browser; it needs nothing "
        "else."
    ]
    if report.tables:
        lines.append(
            f"Wrote {count_text(len(report.tables), 'table')} to {report.tables[0].parent}"
        )
    if report.missing_images:
        lines.append(
            f"note: {count_text(report.missing_images, 'image is', 'images are')} gone or changed "
            "since the run, without a picture"
        )
    make_console().print("\n".join(lines), soft_wrap=True)
