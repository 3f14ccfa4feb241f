"""The report of a run: read what it left, make sections, write one page, and tables if asked."""

import shlex
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.heads.data.task import REFIT
from headrace.pipelines.finished import FinishedRun, read_finished_run
from headrace.pipelines.number_format import images_text, number_text
from headrace.pipelines.planning.leaderboard import inputs_text
from headrace.pipelines.report.cost import cost_section, seconds_text
from headrace.pipelines.report.data import data_section
from headrace.pipelines.report.evaluation import test_section
from headrace.pipelines.report.images.embedding import map_section
from headrace.pipelines.report.images.image_quality import measured_frame, quality_section
from headrace.pipelines.report.images.slices import slices_section
from headrace.pipelines.report.images.small_copies import SmallCopies, make_small_copies
from headrace.pipelines.report.instances import instance_sections
from headrace.pipelines.report.judged import image_table, judged_sides
from headrace.pipelines.report.leaders import leaderboard_section, metric_title, taps_section
from headrace.pipelines.report.leakage import leakage_section
from headrace.pipelines.report.networks import network_sections
from headrace.pipelines.report.outcome import predictions_section
from headrace.pipelines.report.page.blocks import Headline, Note, Section
from headrace.pipelines.report.page.thumbnails import Thumbnails
from headrace.pipelines.report.provenance import provenance_section
from headrace.pipelines.report.selected_model import (
    SelectedModel,
    TestPredictions,
    find_selected,
    test_predictions,
)
from headrace.pipelines.report.selection_and_advice import (
    advice_section,
    choice_section,
    ensemble_section,
    expected_text,
)
from headrace.pipelines.report.suspects import suspects_section
from headrace.pipelines.report.write import Report, require_ours, write_page, written_text
from headrace.pipelines.run_directory import require_writable

MAX_PICTURES = 3000  # on the map: about 1.5 kB each


def write_report(
    run: Path | str,
    out: Path | str | None = None,
    *,
    tables: bool = False,
    watts: float | None = None,
    pictures: int = MAX_PICTURES,
    trust_code: Collection[str] = (),
) -> Report:
    """Write the page of a finished run to `out`, by default report.html in its directory.

    A page and tables of an earlier report are replaced.

    run: its directory, or the recipe that made it.
    tables: also write every table of the page as CSV and Parquet, in a folder beside it.
    watts: what the machine draws while it works.
    pictures: how many images of the map have a picture.
    trust_code: "module:name" of code that may be imported to predict the test images again, beside
    what the recipe names if the run is given by its recipe; without it the page says what is
    missing.

    Raises HeadraceError, among them OutputExists for any other file at `out`; OSError.
    """
    finished_run = read_finished_run(run, trust_code=trust_code)
    page_path = Path(out) if out else finished_run.paths.report
    # Before the page is made, which takes a minute for many images.
    if out is None:
        require_writable(
            finished_run.paths, f"headrace report {shlex.quote(str(run))} --out report.html"
        )
    require_ours(page_path)
    thumbnails = run_thumbnails(finished_run)
    sections = make_sections(finished_run, thumbnails, watts, pictures)
    return write_page(
        page_path,
        finished_run.paths.root.name,
        _byline(finished_run),
        make_headline(finished_run),
        sections,
        tables=tables,
        missing_images=thumbnails.missing,
    )


def run_thumbnails(run: FinishedRun) -> Thumbnails:
    """Pictures of the run's images; none where the images are gone."""
    # In their place, a text says why they could not be listed.
    image_paths = {} if isinstance(run.images, str) else run.images.image_paths
    return Thumbnails(image_paths, run.recipe.images.pixel_range)


def make_sections(
    run: FinishedRun, thumbnails: Thumbnails, watts: float | None, max_pictures: int
) -> tuple[Section, ...]:
    """Return the page's sections in order. max_pictures: images of the map that have a picture."""
    selected = find_selected(run)
    tested = test_predictions(run, selected)
    sides = judged_sides(run, tested)
    images = image_table(run, sides)
    copies = make_small_copies(
        thumbnails.paths, _pictured(images, max_pictures), thumbnails.pixel_range
    )
    measured = measured_frame(copies)
    return (
        leaderboard_section(run),
        taps_section(run),
        predictions_section(run),
        map_section(
            run,
            images.merge(measured, left_on="content", right_index=True, how="left"),
            copies.by_content,
            _map_notes(selected, tested, copies),
        ),
        test_section(run, selected, tested),
        choice_section(run),
        suspects_section(run, thumbnails),
        *instance_sections(run, selected, thumbnails),
        slices_section(run, sides, measured),
        leakage_section(run, thumbnails),
        quality_section(run, images, copies, measured, thumbnails),
        data_section(run),
        *network_sections(run),
        ensemble_section(run),
        advice_section(run),
        cost_section(run, watts),
        provenance_section(run),
    )


def _pictured(images: pd.DataFrame, max_pictures: int) -> list[str]:
    """Return the content hashes of the images pictured on the map: up to half of them are drawn
    among the mistakes, the rest among all images.
    """
    # With a seed, so that the same run gives the same page.
    rng = np.random.default_rng(0)
    contents = images["content"].to_numpy(str)
    # A regression has no outcome.
    wrong = np.flatnonzero(images.get("outcome", pd.Series("", index=images.index)) == "wrong")
    drawn = np.concatenate(
        [rng.permutation(wrong)[: max_pictures // 2], rng.permutation(len(images))]
    )
    return list(dict.fromkeys(contents[drawn].tolist()))[:max_pictures]


def _map_notes(
    selected: SelectedModel, tested: TestPredictions | str, copies: SmallCopies
) -> list[Note]:
    texts = []
    # Without an evaluation on record, the test section says that there is none.
    if isinstance(tested, str) and selected.test_evaluation is not None:
        texts.append(f"Test images are not on the map: {tested}.")
    if copies.unreadable:
        texts.append(
            f"{count_text(copies.unreadable, 'image has', 'images have')} no picture: they are "
            "gone, have changed, or cannot be read."
        )
    if copies.not_read:
        texts.append(
            f"{count_text(copies.not_read, 'more picture was', 'more pictures were')} left out: "
            "2 GB of files were read."
        )
    return [Note(text) for text in texts]


def make_headline(run: FinishedRun) -> Headline:
    """The winner, its scores, and what they rest on."""
    winner, metric = run.winner, run.metric
    values = [
        (
            "winner",
            winner.kind,
            f"{winner.settings} on {inputs_text(winner.inputs, list(run.feature_specs))}",
        ),
        (
            f"validation {metric_title(metric)}",
            number_text(winner.score, metric),
            f"± {number_text(winner.standard_error, metric)} over {winner.folds} folds; "
            "it was chosen by this",
        ),
    ]
    if (expected := expected_text(run)) is not None:
        values.append(("expected on new images", *expected))
    selected = find_selected(run)
    if selected.ensemble is not None:
        nested = selected.ensemble["nested"]
        score_text = number_text(nested["value"], nested["metric"])
        remark = (
            f"{selected.heads}; validation {metric_title(nested['metric'])} {score_text}, better "
            "than a single head"
        )
        values.append(("the selected model", "ensemble", remark))
    values.append(_test_value(run, selected))
    n_heads = int((run.heads["fold"] != REFIT).sum())
    values.append(
        (
            "compared",
            count_text(n_heads, "head"),
            f"{count_text(len(run.board), 'setting')} on "
            f"{count_text(run.board['inputs'].nunique(), 'input')}",
        )
    )
    if not run.stages.empty:
        time_text = seconds_text(float(run.stages["seconds"].sum()))
        values.append(("time", time_text, "all calls of this run together"))
    return Headline(tuple(values))


def _test_value(run: FinishedRun, selected: SelectedModel) -> tuple[str, str, str]:
    if selected.test_evaluation is None:
        remark = "the test split was not evaluated"
        if selected.damage:
            remark = "which model is selected is not known; see the test section"
        return f"test {metric_title(run.metric)}", "–", remark
    result = selected.test_evaluation["result"]
    value, low, high = (
        number_text(result[name], result["metric"]) for name in ("value", "low", "high")
    )
    remark = (
        f"{'of the ensemble; ' if selected.ensemble is not None else ''}95 % interval {low} to "
        f"{high}, {images_text(result['images'], None, result.get('units'))} never seen before"
    )
    return f"test {metric_title(result['metric'])}", value, remark


def _byline(run: FinishedRun) -> str:
    task_word, target_words = {
        "single": ("single-label", ("class", "classes")),
        "multi": ("multi-label", ("label", "labels")),
        "regression": ("regression", ("target", "targets")),
    }[run.task_kind]
    return f"{task_word} task, {count_text(len(run.classes), *target_words)}; {written_text()}"
