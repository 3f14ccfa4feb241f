"""The section on units (a unit: the images of a patient, say, that are predicted together): the
images of most weight in right and in wrong predictions.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.heads.arrays import Array, Doubles, Floats, Index, Mask
from headrace.heads.evaluate.ensemble import average
from headrace.heads.evaluate.units import aggregate_units
from headrace.heads.results import BankResult, read_bank
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.records import RunDamaged, read_table
from headrace.pipelines.report.judged import class_texts
from headrace.pipelines.report.page.blocks import (
    Block,
    Column,
    Gallery,
    Note,
    Picture,
    Section,
    Table,
)
from headrace.pipelines.report.page.thumbnails import Thumbnails
from headrace.pipelines.report.selected_model import SelectedModel
from headrace.pipelines.selection.instance_weights import takes_units

_SHOWN_UNITS = 12
_COLUMNS = (
    Column("unit", "unit"),
    Column("id", "image"),
    Column("weight", "weight", "share", "in the prediction of its unit; they sum to 1"),
    Column("label", "label of the unit"),
    Column("predicted", "predicted"),
    Column("outcome", "outcome"),
)


def instance_sections(
    run: FinishedRun, selected: SelectedModel, thumbnails: Thumbnails
) -> tuple[Section, ...]:
    """Return the section; nothing if no head of the selected model predicts units as a whole."""
    heads = _selected_heads(run, selected)
    # Heads that predict images one by one weigh all images of a unit alike.
    if not any(takes_units(row) for _, row in heads):
        return ()
    lead = (
        "What each image weighs in the prediction of its unit, by the head that did not train on "
        "it. A right answer that rests on the background is right for the wrong reason."
    )
    if len(heads) > 1:
        lead += (
            " The selected model is an ensemble: an image's weights of its members are averaged as "
            "their predictions are, and in a member that predicts images one by one all images of "
            "a unit weigh the same."
        )
    try:
        blocks = _blocks(run, heads, thumbnails)
    except (FileNotFoundError, RunDamaged) as error:
        blocks = [Note(f"The weights cannot be read: {error}", "warning")]
    return (Section("instances", "The images that decide", lead, tuple(blocks)),)


def _selected_heads(run: FinishedRun, selected: SelectedModel) -> Sequence[tuple[float, pd.Series]]:
    """Return the heads of the selected model: their weights, and their rows of the leaderboard."""
    if selected.ensemble is None:
        return [(1.0, run.board.iloc[0])]
    row_of_rank = run.board.set_index("rank", drop=False)
    return [
        (member["weight"], row_of_rank.loc[member["rank"]])
        for member in selected.ensemble["members"]
    ]


def _blocks(
    run: FinishedRun, heads: Sequence[tuple[float, pd.Series]], thumbnails: Thumbnails
) -> list[Block]:
    csv_bytes = read_table(run.paths.instance_weights)
    # Without keep_default_na a unit named "None" would become nan.
    weights = pd.read_csv(csv_bytes, dtype={"unit": str, "id": str}, keep_default_na=False)
    rows = _rows_of(weights["id"], run.bank)
    target = run.bank.target[rows]
    predicted = _out_of_fold_units(run, heads, weights)
    is_wrong, surprise = _wrong_and_surprise(run.task_kind, target, predicted)
    frame = weights[["unit", "id", "weight"]].assign(
        label=_texts(run, target),
        predicted=_texts(run, predicted),
        outcome=np.where(is_wrong, "wrong", "right"),
        surprise=surprise,  # the key that units are sorted by; a column of instances.csv
        content=run.bank.content[rows].astype(str),
    )
    is_regression = run.task_kind == "regression"
    words = {
        "wrong": "that are furthest off" if is_regression else "that are predicted wrongly",
        "right": "that are closest" if is_regression else "that are predicted rightly",
    }
    blocks: list[Block] = []
    for outcome, text in words.items():
        units = frame[frame["outcome"] == outcome].groupby("unit")["surprise"].first()
        shown = units.sort_values(ascending=False, kind="stable").index[:_SHOWN_UNITS].tolist()
        if shown:
            caption = (
                f"The two weightiest images of {len(shown):,} of {count_text(len(units), 'unit')} "
                f"{text}"
            )
            blocks.append(Gallery(caption, _pictures(frame, shown, thumbnails)))
    caption = "Every image, by unit, the weightiest first"
    return [
        *blocks,
        Table("instances", caption, _COLUMNS, frame, filters=("outcome",), search=True),
    ]


def _rows_of(ids: pd.Series, bank: BankResult) -> Index:
    row_of_id = {image_id: row for row, image_id in enumerate(bank.ids.tolist())}
    return ids.map(row_of_id).to_numpy(np.int64)


def _out_of_fold_units(
    run: FinishedRun, heads: Sequence[tuple[float, pd.Series]], images: pd.DataFrame
) -> Floats:
    """Return (n, C) for each image the prediction of its unit, averaged over heads that did not
    train on it.

    images: columns `id` and `unit`.
    """
    predicted_by_head = []
    for _, row in heads:
        bank = read_bank(row["path"])
        rows = _rows_of(images["id"], bank)
        predicted_by_head.append(bank.out_of_fold_predictions(str(row["spec"]))[rows])
    head_weights = np.array([head_weight for head_weight, _ in heads])
    predicted = average(head_weights, np.stack(predicted_by_head))
    unit_of_row = pd.factorize(images["unit"])[0]
    aggregation = run.recipe.task.unit_aggregation
    by_unit = aggregate_units(run.bank.task_kind, predicted, unit_of_row, aggregation)
    return np.asarray(by_unit[unit_of_row], np.float32)


def _wrong_and_surprise(task_kind: str, target: Array, predicted: Floats) -> tuple[Mask, Doubles]:
    """Return (n,) whether rows are wrong, and (n,) a number by which units are sorted, largest
    first: the probability of the predicted class, or the largest error of a row.

    In a regression the larger half of the errors counts as wrong, and the errors of the right rows
    are negated, so that the closest come first.
    """
    if task_kind == "single":
        return predicted.argmax(1) != target, predicted.max(1).astype(np.float64)
    error = np.abs(predicted - target)
    if task_kind == "multi":
        return ((predicted >= 0.5) != (target > 0)).any(1), error.max(1).astype(np.float64)
    scaled = (error / np.maximum(error.std(0), 1e-12)).max(1).astype(np.float64)
    # No error of a number is wrong by itself: the larger half stands for the wrong ones.
    is_wrong = scaled > np.median(scaled)
    return is_wrong, np.where(is_wrong, scaled, -scaled)


def _texts(run: FinishedRun, values: Array) -> list[str]:
    """Return labels or predictions (n,) or (n, C) as text."""
    if run.task_kind != "regression":
        return class_texts(run, values, "; ")
    return ["; ".join(f"{value:.4g}" for value in row) for row in values.tolist()]


def _pictures(frame: pd.DataFrame, units: list[str], thumbnails: Thumbnails) -> tuple[Picture, ...]:
    images_by_unit = frame.groupby("unit")
    pictures = []
    for unit in units:
        images = images_by_unit.get_group(unit)
        weightiest = images.head(2)  # the table is sorted by falling weight within a unit
        weights = ", ".join(f"{100 * weight:.1f} %" for weight in weightiest["weight"])
        label, predicted = str(images["label"].iloc[0]), str(images["predicted"].iloc[0])
        alt_texts = [
            f"Image {image_id} of unit {unit}, label {label}, predicted {predicted}"
            for image_id in weightiest["id"]
        ]
        weights_text = f"{weights} of {count_text(len(images), 'image')}"
        lines = ("label", label), ("predicted", predicted), ("weights", weights_text)
        contents = weightiest["content"].tolist()
        pictures.append(thumbnails.picture(contents, alt_texts, unit, lines))
    return tuple(pictures)
