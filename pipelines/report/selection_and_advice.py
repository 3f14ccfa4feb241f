"""Sections on the selection, the ensemble and the advice, from the records that a run or `headrace
advise` has left. For a record that is not there, a line names the command that makes it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.models.ensemble import ENSEMBLE_DESCRIPTION
from headrace.pipelines.number_format import level_text, number_text
from headrace.pipelines.planning.leaderboard import inputs_text
from headrace.pipelines.records import RunDamaged, read_record, read_table
from headrace.pipelines.report.leaders import metric_title
from headrace.pipelines.report.page import figures
from headrace.pipelines.report.page.blocks import Block, Column, Facts, Figure, Note, Section, Table

Record = Mapping[str, Any]

# Scores of a feature set without a head; which of them there are depends on the task.
_SCORES = (
    Column("name", "feature set"),
    Column("width", "features", "count"),
    Column(
        "logme",
        "LogME",
        "number",
        "log evidence per image of a linear model (You et al. 2021); higher is better",
    ),
    Column("h_score", "H-score", "number", "Bao et al. 2019, with shrinkage; higher is better"),
    Column(
        "nce",
        "NCE",
        "number",
        "negative conditional entropy (Tran et al. 2019), where logits are kept; higher is better",
    ),
    Column("neighbours", "nearest neighbours", "share", "accuracy or R² of the nearest neighbours"),
    Column(
        "bayes_low",
        "Bayes error from",
        "share",
        "Cover and Hart 1967: no head on these features errs less",
    ),
    Column("bayes_high", "to", "share"),
)


def choice_section(run: FinishedRun) -> Section:
    """Return the section: the winner's score corrected for the choice, and the settings tied with
    it.
    """
    remedy = "`headrace run RECIPE` with this version measures it"
    lead_text = (
        "The best of many looks better than it is. The correction and the comparisons resample the "
        "same validation images for all."
    )
    blocks = blocks_of_record(run, run.paths.selection, remedy, _choice_blocks)
    return Section("choice", "How sure is the choice?", lead_text, blocks)


def ensemble_section(run: FinishedRun) -> Section:
    remedy = (
        "put `ensemble: {}` into the recipe and `headrace run RECIPE` again; nothing is trained "
        "anew"
    )
    record_path = run.paths.ensemble / ENSEMBLE_DESCRIPTION
    blocks = blocks_of_record(run, record_path, remedy, _ensemble_blocks)
    lead_text = "Heads averaged, scored on images that had no part in picking them."
    return Section("ensemble", "Ensemble", lead_text, blocks)


def advice_section(run: FinishedRun) -> Section:
    remedy = "`headrace advise RUN` measures it, in a minute or so"
    blocks = blocks_of_record(run, run.paths.advice, remedy, _advice_blocks)
    lead_text = "More images, training deeper, or neither: what the cached features say."
    return Section("advice", "What would help most", lead_text, blocks)


def expected_text(run: FinishedRun) -> tuple[str, str] | None:
    """Return the winner's expected score on new images, and its interval as a remark; None if they
    are not on record.
    """
    try:
        selection_record = read_record(run.paths.selection)
        expected_value, lower_end, upper_end = (
            number_text(float(selection_record[name]), run.metric)
            for name in ("expected", "low", "high")
        )
    # Absent, damaged (which its own section says), of another version, or undefined.
    except (FileNotFoundError, RunDamaged, KeyError, TypeError, ValueError):
        return None
    n_tried = selection_record["tried"]
    choice = f"corrected for being the best of {n_tried:,}" if n_tried > 1 else "the only setting"
    return expected_value, f"95 % interval {lower_end} to {upper_end}, {choice}"


def blocks_of_record(
    run: FinishedRun,
    path: Path,
    remedy: str,
    make_blocks: Callable[[FinishedRun, Record], Sequence[Block]],
) -> tuple[Block, ...]:
    """Return the blocks that are made of a record, or a note that says why there are none."""
    try:
        return tuple(make_blocks(run, read_record(path, remedy)))
    except FileNotFoundError:
        return (Note(f"Not measured: {remedy}."),)
    # One damaged record costs its own section, not the page.
    except RunDamaged as error:
        return (Note(f"Left out: {error}.", "warning"),)
    # A record of another version lacks keys, or has other types under them.
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return (
            Note(
                f"{path.name} is of another version of headrace ({type(error).__name__}: {error})."
            ),
        )


def _choice_blocks(run: FinishedRun, selection_record: Record) -> list[Block]:
    expected_value, lower_end, upper_end, validation_score = (
        number_text(selection_record[name], run.metric)
        for name in ("expected", "low", "high", "validation")
    )
    at_temperature = number_text(
        selection_record.get("calibrated", selection_record["validation"]), run.metric
    )
    chosen_text = (
        f"{validation_score}, the best of {count_text(selection_record['tried'], 'setting')} on "
        f"{selection_record['images']:,} validation "
        f"{'images' if run.recipe.task.unit is None else 'units'}"
    )
    # A temperature changes log loss and the like alone.
    if at_temperature != validation_score:
        chosen_text += f"; {at_temperature} at its temperature"
    facts = Facts(
        {
            f"expected {metric_title(run.metric)} on new images": f"{expected_value} (95 % "
            f"interval {lower_end} to {upper_end})",
            "as chosen": chosen_text,
            "as good as the winner": f"{selection_record['statistically_tied'] - 1:,} of "
            f"{count_text(selection_record['tried'] - 1, 'other setting')} cannot be told apart "
            "from it (95 %)",
        }
    )
    comparisons_path = run.paths.comparisons
    if comparisons_path.exists():
        return [facts, _comparison_table(run)]
    # A single setting is compared with none.
    if selection_record["tried"] == 1:
        return [facts]
    gone = f"{comparisons_path.name} is not there: `headrace run RECIPE` writes it again."
    return [facts, Note(gone)]


def _comparison_table(run: FinishedRun) -> Table:
    comparison_frame = pd.read_csv(
        read_table(run.paths.comparisons), dtype={"inputs": str, "kind": str, "settings": str}
    )
    input_names = list(run.feature_specs)
    comparison_frame = comparison_frame.assign(
        inputs=[inputs_text(text.split(" + "), input_names) for text in comparison_frame["inputs"]]
    )
    comparison_frame["statistically_tied"] = (
        comparison_frame["statistically_tied"].fillna(False).astype(bool)
    )
    # The interval is of each pair alone, the verdict of all pairs together. Where they differ, a
    # bare "tied" would contradict the interval beside it. From 5e-5 a number is written as 0.0001.
    alone = comparison_frame.get("low", pd.Series(0.0, index=comparison_frame.index)) >= 5e-5
    comparison_frame["verdict"] = np.select(
        [comparison_frame["rank"] == 1, ~comparison_frame["statistically_tied"], alone],
        ["the winner", "behind", "behind by this pair alone, tied among all"],
        "tied",
    )
    table_columns = (
        Column("rank", "rank", "count"),
        *(Column(name, name) for name in ("inputs", "kind", "settings")),
        Column(
            "difference",
            "behind the winner",
            "number",
            f"in {metric_title(run.metric)}, on the same images",
        ),
        Column("low", "95 % from", "number", "of this pair alone"),
        Column("high", "to", "number"),
        Column(
            "p_corrected",
            "p",
            "number",
            "that it is as good as the winner, corrected for the number of comparisons",
        ),
        Column(
            "verdict",
            "verdict",
            hint="tied: it may be the truly best one (95 %, corrected for the best having been "
            "picked from all of them); behind by this pair alone: its own interval excludes 0, and "
            "so many comparisons give such a one by chance",
        ),
    )
    present_columns = tuple(
        column for column in table_columns if column.name in comparison_frame.columns
    )
    return Table(
        "comparisons",
        "Every setting against the winner",
        present_columns,
        comparison_frame,
        filters=("verdict", "kind"),
        search=True,
    )


def _ensemble_blocks(run: FinishedRun, ensemble_record: Record) -> list[Block]:
    nested_result, metric = ensemble_record["nested"], ensemble_record["nested"]["metric"]
    ensemble_score, lower_end, upper_end, single_score = (
        number_text(nested_result[name], metric) for name in ("value", "low", "high", "single")
    )
    interval_of = f"{level_text(nested_result['level'])} interval"
    gain_interval = f"{interval_of} of its gain over a single head"
    selected_note = Note(f"The {gain_interval} reaches 0: the winner stays the selected.")
    if nested_result["chosen"]:
        selected_note = Note(f"It is the selected model: the {gain_interval} lies above 0.", "good")
    gain_text = (
        f"{nested_result['gain']:+.4f} ({interval_of} {nested_result['gain_low']:+.4f} to "
        f"{nested_result['gain_high']:+.4f})"
    )
    input_names = list(run.feature_specs)
    member_frame = pd.DataFrame(ensemble_record["members"])
    member_frame["inputs"] = [inputs_text(inputs, input_names) for inputs in member_frame["inputs"]]
    table_columns = (
        Column("weight", "weight", "share"),
        Column("rank", "rank", "count"),
        *(Column(name, name) for name in ("inputs", "kind", "settings")),
    )
    return [
        Facts(
            {
                f"validation {metric_title(metric)}": f"{ensemble_score} (95 % interval "
                f"{lower_end} to {upper_end})",
                "the best single head, picked on other images too": single_score,
                "better by": gain_text,
                "temperature": f"{ensemble_record['temperature']:.3f}",
            }
        ),
        selected_note,
        Table("ensemble", "Its heads", table_columns, member_frame, sortable=False, wide=True),
    ]


def _advice_blocks(run: FinishedRun, advice_record: Record) -> list[Block]:
    advice_blocks: list[Block] = [
        Note(str(advice_record["sentence"]), "good"),
        *(Note(str(reason)) for reason in advice_record["reasons"]),
    ]
    evidence = advice_record.get("evidence")
    if not evidence:
        return advice_blocks
    if evidence["curve"].get("images"):
        advice_blocks.append(_curve_figure(evidence))
    if evidence["scores"]:
        score_frame = pd.DataFrame(evidence["scores"])
        advice_blocks.append(
            Table(
                "transfer-scores",
                "Transfer scores: how well features suit the task, without a head",
                tuple(column for column in _SCORES if column.name in score_frame),
                score_frame,
            )
        )
    return advice_blocks


def _curve_figure(evidence: Record) -> Figure:
    image_counts = list(map(float, evidence["curve"]["images"]))
    errors = list(map(float, evidence["curve"]["error"]))
    last_count, last_error = image_counts[-1], errors[-1]
    extrapolated_points = [
        (
            last_count * int(times),
            *(float(extrapolation[name]) for name in ("value", "low", "high")),
        )
        for times, extrapolation in evidence["ahead"].items()
    ]
    # The dashed line begins where the measured one ends.
    dashed_points = [(last_count, last_error, last_error, last_error), *sorted(extrapolated_points)]
    dashed = pd.DataFrame(dashed_points, columns=["images", "error", "low", "high"])
    measured = pd.DataFrame({"images": image_counts, "error": errors})
    curve_frame = pd.concat([measured, dashed[1:]], ignore_index=True)
    table_columns = (
        Column("images", "images trained on", "count"),
        Column("error", "error", "share"),
        Column("low", "95 % from", "share", "of the extrapolated part"),
        Column("high", "to", "share"),
    )
    return Figure(
        figures.learning_curve(measured, dashed),
        "Learning curve: the error of the best head against the images trained on, from "
        f"{image_counts[0]:,.0f} to {last_count:,.0f} images measured, and beyond that "
        "extrapolated; the numbers are in the table below.",
        "Learning curve of the best head at each size; dashed: a power law's extrapolation with "
        "its 95 % interval.",
        Table("learning-curve", "Learning curve", table_columns, curve_frame, sortable=False),
    )
