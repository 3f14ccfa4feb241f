"""The report of a run, top to bottom: read what it left, make the sections, write one page and, if
asked, the tables.
"""

import datetime
import importlib.metadata
import io
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from headrace.cache.atomic_io import publish_replace
from headrace.cache.errors import HeadraceError
from headrace.cache.integrity.garbage import remove_temporaries
from headrace.heads.data.task import REFIT
from headrace.pipelines.finished import FinishedRun, read_finished_run
from headrace.pipelines.number_format import number_text
from headrace.pipelines.planning.leaderboard import inputs_text
from headrace.pipelines.report.blocks import Headline, Section, Table, tables_of
from headrace.pipelines.report.cost import cost, seconds_text
from headrace.pipelines.report.data import data
from headrace.pipelines.report.evaluation import test_split
from headrace.pipelines.report.evidence import advice, choice, ensemble, expected_text
from headrace.pipelines.report.leaders import leaderboard, metric_title, taps
from headrace.pipelines.report.leakage import leakage
from headrace.pipelines.report.networks import networks
from headrace.pipelines.report.outcome import predictions
from headrace.pipelines.report.page import render
from headrace.pipelines.report.provenance import provenance
from headrace.pipelines.report.selected_model import find_selected
from headrace.pipelines.report.suspects import suspects
from headrace.pipelines.report.thumbnails import Thumbnails
from headrace.pipelines.run_directory import require_writable

_TITLE = "headrace report: "


class ReportThere(HeadraceError, FileExistsError):
    """A file is there that no report wrote; it is not replaced."""


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    bytes: int
    tables: tuple[Path, ...]
    missing_images: int  # thumbnails whose image is gone or has changed


def write_report(
    run: Path,
    out: Path | None = None,
    *,
    tables: bool = False,
    watts: float | None = None,
    trust_code: Collection[str] = (),
) -> Report:
    """Write the page of a finished run to `out`, by default report.html in its directory.

    run: its directory, or the recipe that made it. tables: also every table of the page as CSV and
    Parquet, in a folder beside it. watts: what the machine draws while it works. trust_code:
    "module:name" of code that may be imported to predict the test images again, beside what the
    recipe names where the run is given by it; otherwise the page says what is missing. A page and
    tables of an earlier report are replaced. Raises NotARun, NoWinner, RunReadOnly, OSError;
    ReportThere for any other file there.
    """
    found = read_finished_run(run, trust_code=trust_code)
    page = out or found.paths.report
    if out is None:
        require_writable(found.paths, f"headrace report {shlex.quote(str(run))} --out report.html")
    _require_ours(page)
    paths = {} if isinstance(found.images, str) else found.images.image_paths
    thumbnails = Thumbnails(paths, found.recipe.images.pixel_range)
    sections = make_sections(found, thumbnails, watts)
    text = render(f"{_TITLE}{found.paths.root.name}", _made(found), headline(found), sections)
    page.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(page)
    again = page.exists()
    publish_replace(page, text.encode("utf-8", "replace"))
    written = (
        write_tables(page.with_name(f"{page.stem}-tables"), sections, replace=again)
        if tables
        else ()
    )
    return Report(page, page.stat().st_size, written, thumbnails.missing)


def make_sections(
    run: FinishedRun, thumbnails: Thumbnails, watts: float | None
) -> tuple[Section, ...]:
    """The page's sections, in its order."""
    return (
        leaderboard(run),
        taps(run),
        predictions(run),
        test_split(run),
        choice(run),
        suspects(run, thumbnails),
        leakage(run, thumbnails),
        data(run),
        *networks(run),
        ensemble(run),
        advice(run),
        cost(run, watts),
        provenance(run),
    )


def headline(run: FinishedRun) -> Headline:
    """The winner, its scores, and what they rest on."""
    winner, metric = run.winner, run.metric
    values = [
        (
            "winner",
            str(winner["kind"]),
            (f"{winner['settings']} on {inputs_text(winner['inputs'], list(run.feature_specs))}"),
        ),
        (
            f"validation {metric_title(metric)}",
            number_text(winner[metric], metric),
            (
                f"± {number_text(winner['standard_error'], metric)} over {winner['folds']} folds; "
                "it was chosen by this"
            ),
        ),
    ]
    if (expected := expected_text(run)) is not None:
        values.append(("expected on new images", *expected))
    selected = find_selected(run)
    if selected.ensemble is not None:
        nested = selected.ensemble["nested"]
        score = number_text(nested["value"], nested["metric"])
        better = f"validation {metric_title(nested['metric'])} {score}, better than a single head"
        values.append(("the selected model", "ensemble", f"{selected.heads}; {better}"))
    if selected.test_evaluation is None:
        values.append((f"test {metric_title(metric)}", "–", "the test split was not evaluated"))
    else:
        result = selected.test_evaluation["result"]
        interval = (
            f"{number_text(result['low'], result['metric'])} to "
            f"{number_text(result['high'], result['metric'])}"
        )
        values.append(
            (
                f"test {metric_title(result['metric'])}",
                number_text(result["value"], result["metric"]),
                f"{'of the ensemble; ' if selected.ensemble is not None else ''}95 % interval "
                f"{interval}, {result['images']:,} images never seen before",
            )
        )
    stages = run.stages
    heads = int((run.heads["fold"] != REFIT).sum())
    values.append(
        (
            "compared",
            f"{heads:,} heads",
            f"{len(run.board):,} settings on {run.board['inputs'].nunique():,} inputs",
        )
    )
    if not stages.empty:
        values.append(
            ("time", seconds_text(float(stages["seconds"].sum())), "all calls of this run together")
        )
    return Headline(tuple(values))


def _require_ours(page: Path) -> None:
    if not page.exists():
        return
    elsewhere = (
        f"Give another name with --out, such as {page.with_name('headrace-report.html')}, or move "
        "it away"
    )
    if not page.is_file():
        raise ReportThere(
            f"{page} is a folder, or no file of the disk; expected the name of a page. {elsewhere}"
        )
    with page.open("rb") as file:
        if _TITLE.encode() not in file.read(4096):
            raise ReportThere(
                f"{page} is there, and headrace report did not write it: it is not replaced. "
                f"{elsewhere}"
            )


def write_tables(
    folder: Path, sections: Sequence[Section], *, replace: bool = False
) -> tuple[Path, ...]:
    """Every table as NAME.csv and NAME.parquet; returns the paths.

    replace: files of these names are known for an earlier report's. Else only both of a pair are;
    raises ReportThere for one alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in () if replace else tables_of(tuple(sections)):
        pair = [
            path for suffix in ("csv", "parquet") if (path := folder / f"{name}.{suffix}").exists()
        ]
        if len(pair) == 1:
            raise ReportThere(
                f"{pair[0]} is there, and headrace report did not write it: it is not replaced. "
                "Move it away"
            )
    written = []
    for name, table in tables_of(tuple(sections)).items():
        frame = plain_frame(table)
        stored = io.BytesIO()
        frame.to_parquet(stored, index=False)
        for suffix, content in (
            ("csv", frame.to_csv(index=False).encode("utf-8", "replace")),
            ("parquet", stored.getvalue()),
        ):
            path = folder / f"{name}.{suffix}"
            remove_temporaries(path)
            publish_replace(path, content)
            written.append(path)
    return tuple(written)


def plain_frame(table: Table) -> pd.DataFrame:
    """The table's columns, in full precision. A confusion matrix has its classes as headings."""
    frame = table.frame[[column.name for column in table.columns]]
    return (
        frame.set_axis([frame.columns[0], *(column.title for column in table.columns[1:])], axis=1)
        if table.shade
        else frame
    )


def _made(run: FinishedRun) -> str:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    word = {"single": "single-label", "multi": "multi-label"}.get(run.task_kind, run.task_kind)
    columns = "classes" if run.task_kind == "single" else "columns"
    version = importlib.metadata.version("headrace")
    return f"{word} task, {len(run.classes)} {columns}; written {now} by headrace {version}"
