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
from headrace.pipelines.report.cost import cost_section, seconds_text
from headrace.pipelines.report.data import data_section
from headrace.pipelines.report.evaluation import test_section
from headrace.pipelines.report.leaders import leaderboard_section, metric_title, taps_section
from headrace.pipelines.report.leakage import leakage_section
from headrace.pipelines.report.networks import network_sections
from headrace.pipelines.report.outcome import predictions_section
from headrace.pipelines.report.page import render_page
from headrace.pipelines.report.provenance import provenance_section
from headrace.pipelines.report.selected_model import find_selected
from headrace.pipelines.report.selection_and_advice import (
    advice_section,
    choice_section,
    ensemble_section,
    expected_text,
)
from headrace.pipelines.report.suspects import suspects_section
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
    finished_run = read_finished_run(run, trust_code=trust_code)
    page_path = out or finished_run.paths.report
    if out is None:
        require_writable(
            finished_run.paths, f"headrace report {shlex.quote(str(run))} --out report.html"
        )
    _require_ours(page_path)
    image_paths = {} if isinstance(finished_run.images, str) else finished_run.images.image_paths
    thumbnails = Thumbnails(image_paths, finished_run.recipe.images.pixel_range)
    sections = make_sections(finished_run, thumbnails, watts)
    page_text = render_page(
        f"{_TITLE}{finished_run.paths.root.name}",
        _made_text(finished_run),
        make_headline(finished_run),
        sections,
    )
    page_path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(page_path)
    page_exists = page_path.exists()
    publish_replace(page_path, page_text.encode("utf-8", "replace"))
    table_paths = (
        write_tables(page_path.with_name(f"{page_path.stem}-tables"), sections, replace=page_exists)
        if tables
        else ()
    )
    return Report(page_path, page_path.stat().st_size, table_paths, thumbnails.missing)


def make_sections(
    run: FinishedRun, thumbnails: Thumbnails, watts: float | None
) -> tuple[Section, ...]:
    """The page's sections, in its order."""
    return (
        leaderboard_section(run),
        taps_section(run),
        predictions_section(run),
        test_section(run),
        choice_section(run),
        suspects_section(run, thumbnails),
        leakage_section(run, thumbnails),
        data_section(run),
        *network_sections(run),
        ensemble_section(run),
        advice_section(run),
        cost_section(run, watts),
        provenance_section(run),
    )


def make_headline(run: FinishedRun) -> Headline:
    """The winner, its scores, and what they rest on."""
    winner, metric = run.winner, run.metric
    headline_values = [
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
        headline_values.append(("expected on new images", *expected))
    selected = find_selected(run)
    if selected.ensemble is not None:
        nested = selected.ensemble["nested"]
        score_text = number_text(nested["value"], nested["metric"])
        comparison_text = (
            f"validation {metric_title(nested['metric'])} {score_text}, better than a single head"
        )
        headline_values.append(
            ("the selected model", "ensemble", f"{selected.heads}; {comparison_text}")
        )
    if selected.test_evaluation is None:
        headline_values.append(
            (f"test {metric_title(metric)}", "–", "the test split was not evaluated")
        )
    else:
        test_result = selected.test_evaluation["result"]
        interval_text = (
            f"{number_text(test_result['low'], test_result['metric'])} to "
            f"{number_text(test_result['high'], test_result['metric'])}"
        )
        headline_values.append(
            (
                f"test {metric_title(test_result['metric'])}",
                number_text(test_result["value"], test_result["metric"]),
                f"{'of the ensemble; ' if selected.ensemble is not None else ''}95 % interval "
                f"{interval_text}, {test_result['images']:,} images never seen before",
            )
        )
    stages = run.stages
    n_heads = int((run.heads["fold"] != REFIT).sum())
    headline_values.append(
        (
            "compared",
            f"{n_heads:,} heads",
            f"{len(run.board):,} settings on {run.board['inputs'].nunique():,} inputs",
        )
    )
    if not stages.empty:
        headline_values.append(
            ("time", seconds_text(float(stages["seconds"].sum())), "all calls of this run together")
        )
    return Headline(tuple(headline_values))


def _require_ours(page_path: Path) -> None:
    if not page_path.exists():
        return
    remedy = (
        f"Give another name with --out, such as {page_path.with_name('headrace-report.html')}, or "
        "move it away"
    )
    if not page_path.is_file():
        raise ReportThere(
            f"{page_path} is a folder, or no file of the disk; expected the name of a page. "
            f"{remedy}"
        )
    with page_path.open("rb") as page_file:
        if _TITLE.encode() not in page_file.read(4096):
            raise ReportThere(
                f"{page_path} is there, and headrace report did not write it: it is not replaced. "
                f"{remedy}"
            )


def write_tables(
    folder: Path, sections: Sequence[Section], *, replace: bool = False
) -> tuple[Path, ...]:
    """Every table as NAME.csv and NAME.parquet; returns the paths.

    replace: files of these names are known for an earlier report's. Else only both of a pair are;
    raises ReportThere for one alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for table_name in () if replace else tables_of(tuple(sections)):
        existing_pair = [
            table_path
            for suffix in ("csv", "parquet")
            if (table_path := folder / f"{table_name}.{suffix}").exists()
        ]
        if len(existing_pair) == 1:
            raise ReportThere(
                f"{existing_pair[0]} is there, and headrace report did not write it: it is not "
                "replaced. Move it away"
            )
    table_paths = []
    for table_name, table in tables_of(tuple(sections)).items():
        table_frame = plain_frame(table)
        parquet_file = io.BytesIO()
        table_frame.to_parquet(parquet_file, index=False)
        for suffix, file_content in (
            ("csv", table_frame.to_csv(index=False).encode("utf-8", "replace")),
            ("parquet", parquet_file.getvalue()),
        ):
            table_path = folder / f"{table_name}.{suffix}"
            remove_temporaries(table_path)
            publish_replace(table_path, file_content)
            table_paths.append(table_path)
    return tuple(table_paths)


def plain_frame(table: Table) -> pd.DataFrame:
    """The table's columns, in full precision. A confusion matrix has its classes as headings."""
    column_frame = table.frame[[column.name for column in table.columns]]
    return (
        column_frame.set_axis(
            [column_frame.columns[0], *(column.title for column in table.columns[1:])], axis=1
        )
        if table.shade
        else column_frame
    )


def _made_text(run: FinishedRun) -> str:
    written_at = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    task_word = {"single": "single-label", "multi": "multi-label"}.get(run.task_kind, run.task_kind)
    column_word = "classes" if run.task_kind == "single" else "columns"
    version = importlib.metadata.version("headrace")
    return (
        f"{task_word} task, {len(run.classes)} {column_word}; written {written_at} by headrace "
        f"{version}"
    )
