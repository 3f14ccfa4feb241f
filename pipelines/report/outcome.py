"""Blocks that show what predictions get right and wrong: confusions, classes, calibration.

N rows, C classes (or label columns, or regression targets).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.heads.arrays import Array, Doubles, Index, Mask
from headrace.heads.evaluate.metrics import metric_names, score
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.report.curves import curve_set
from headrace.pipelines.report.leaders import metric_format, metric_title
from headrace.pipelines.report.page import figures
from headrace.pipelines.report.page.blocks import (
    Block,
    Column,
    Facts,
    Figure,
    Matrix,
    Note,
    Section,
    Table,
    make_table,
)

# A matrix of more classes is drawn as a picture, with a table of its largest entries.
MATRIX_CLASSES = 15
BINS = 15  # of the reliability diagram; as many as in the metric calibration_error
_FIGURE_TARGETS = 4  # of a regression, each with a diagram


def predictions_section(run: FinishedRun) -> Section:
    """Return the section on the winner's out-of-fold predictions."""
    target, predicted = run.scored_predictions
    blocks = [
        *outcome_blocks(run.task_kind, run.classes, target, predicted, "validation", "the winner"),
        *_calibration_blocks(run, target),
    ]
    n_images, unit = len(run.held_out_rows), run.recipe.task.unit
    rows_text = (
        count_text(n_images, "validation image")
        if unit is None
        else f"{len(target):,} validation units ({unit}) of {count_text(n_images, 'image')}"
    )
    model_text = "network" if run.winner.kind == "finetune" else "head"
    lead_text = (
        f"The winner, {run.winner.kind} {run.winner.settings}, on {rows_text}: each "
        f"predicted by the {model_text} that was trained without its fold."
    )
    title = "What the winner gets right and wrong"
    return Section("predictions", title, lead_text, tuple(blocks))


def _calibration_blocks(run: FinishedRun, target: Array) -> list[Block]:
    """Return the reliability diagram at the winner's temperature, and the errors with it and
    without.
    """
    if run.task_kind == "regression":
        return []
    stored = run.calibration
    if stored is None:
        return [
            Note(
                "The winner has no temperature: `headrace run RECIPE` with this version gives it "
                "one, and trains nothing."
            )
        ]
    rows_name = "images" if run.recipe.task.unit is None else "units"
    facts = Facts(
        {
            "temperature": f"{stored['temperature']:.3f}: what `predict` and `export` divide the "
            "winner's log-odds by",
            "calibration error": f"{stored['error_before']:.3f} without it, "
            f"{stored['error_after']:.3f} with it",
            "log loss": f"{stored['loss_before']:.3f} without it, {stored['loss_after']:.3f} with "
            "it",
            "fitted on": f"{stored['images']:,} validation {rows_name}; scored fold by fold at the "
            "temperature of the other folds",
        }
    )
    calibrated = run.calibrated_predictions
    if isinstance(calibrated, str):
        text = f"The reliability at this temperature is left out: {calibrated}."
        return [facts, Note(text, "warning")]
    model_name = "the winner at its temperature"
    figure = _reliability_figure(
        run.task_kind, target, calibrated, "validation", model_name, "calibrated"
    )
    return [figure, facts]  # this order puts the figure beside that without the temperature


def outcome_blocks(
    task_kind: str,
    classes: tuple[str, ...],
    target: Array,
    predicted: Array,
    split_name: str,
    model_name: str,
) -> list[Block]:
    """Return the blocks for a kind of task.

    target: (N, ...) as in `Task.target`; predicted: (N, C). split_name ("validation", "test") and
    model_name are used in captions and table names.
    """
    if task_kind == "regression":
        return _regression_blocks(classes, target, predicted, split_name)
    blocks: list[Block]
    if task_kind == "multi":
        blocks = [_label_table(classes, target, predicted, split_name)]
    else:
        blocks = [
            *_confusion_blocks(classes, target, predicted, split_name, model_name),
            _class_table(classes, target, predicted, split_name, model_name),
        ]
    curves = curve_set(task_kind, classes, target, predicted, split_name, model_name)
    # A class that all rows or none have has no curve.
    blocks += [curves] if curves.curves else []
    blocks.append(_reliability_figure(task_kind, target, predicted, split_name, model_name))
    return blocks


def _confusion_blocks(
    classes: tuple[str, ...], target: Array, predicted: Array, split_name: str, model_name: str
) -> list[Block]:
    C = len(classes)
    confusion_counts = np.bincount(target * C + predicted.argmax(1), minlength=C * C).reshape(C, C)
    meaning = f"{split_name}: rows are what the label says, columns what {model_name} says"
    if C <= MATRIX_CLASSES:
        columns: dict[Column, Any] = {Column("actual", "actual ↓ predicted →"): list(classes)}
        for i, name in enumerate(classes):
            columns[Column(f"c{i}", name, "count")] = confusion_counts[:, i]
        caption, name = f"Confusion matrix, {meaning}", f"confusion-{split_name}"
        return [make_table(name, caption, columns, sortable=False, shade="rows")]
    recall = _safe_ratio(np.diag(confusion_counts), confusion_counts.sum(1))
    orders = (
        ("confused classes side by side", _confused_order(confusion_counts)),
        ("worst recall first", np.argsort(recall, kind="stable")),
        ("by name", np.arange(C)),
        ("largest first", np.argsort(-confusion_counts.sum(1), kind="stable")),
    )
    caption = f"Confusion matrix of {C} classes, {meaning}"
    matrix = Matrix(f"matrix-{split_name}", caption, classes, confusion_counts, orders)
    return [_confusion_list(classes, confusion_counts, split_name), matrix]


def _confusion_list(classes: tuple[str, ...], confusion_counts: Index, split_name: str) -> Table:
    wrong_counts = confusion_counts.copy()
    np.fill_diagonal(wrong_counts, 0)
    actual, predicted = np.nonzero(wrong_counts)
    commonest_first = np.argsort(-wrong_counts[actual, predicted], kind="stable")
    actual, predicted = actual[commonest_first], predicted[commonest_first]
    images, names = wrong_counts[actual, predicted], np.asarray(classes, object)
    class_sizes = np.maximum(confusion_counts.sum(1), 1)
    columns = {
        Column("actual", "actual"): names[actual],
        Column("predicted", "predicted"): names[predicted],
        Column("images", "count", "count"): images,
        Column("share", "of the class", "share"): images / class_sizes[actual],
    }
    caption = f"Confusions, the commonest first ({split_name})"
    return make_table(f"confusion-{split_name}", caption, columns, search=True)


def _confused_order(confusion_counts: Index) -> Index:
    """Return the classes in an order in which those that are confused are neighbours: the leaves of
    their average-linkage tree, by the share of images that are confused.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    # As shares, so that a large class does not look like the one that all are confused with.
    shares = confusion_counts / np.maximum(confusion_counts.sum(1, keepdims=True), 1)
    distance = 1 - np.minimum(shares + shares.T, 1)
    np.fill_diagonal(distance, 0)
    return np.asarray(leaves_list(linkage(squareform(distance, checks=False), "average")), np.int64)


def _class_table(
    classes: tuple[str, ...], target: Array, predicted: Array, split_name: str, model_name: str
) -> Table:
    # Each class against the rest.
    is_class = target[:, None] == np.arange(len(classes))
    is_predicted = predicted.argmax(1)[:, None] == np.arange(len(classes))
    frame = _detection_frame(is_class, is_predicted, predicted, ("auc",))
    frame.insert(0, "class", list(classes))
    are_many = len(classes) > MATRIX_CLASSES
    if are_many:
        frame = frame.sort_values(["recall", "class"], ignore_index=True)
    columns = (
        Column("class", "class"),
        Column("images", "count", "count"),
        Column("predicted", "predicted", "count", f"what {model_name} says is of this class"),
        Column("recall", "recall", "share", "share of the class that is found"),
        Column(
            "precision", "precision", "share", "share of what is said to be of the class that is"
        ),
        Column("f1", "F1", "number", "harmonic mean of recall and precision"),
        Column("auc", "AUC", "number", "this class against the rest"),
    )
    caption = f"Class by class, {split_name}" + (", the worst recall first" if are_many else "")
    return Table(f"classes-{split_name}", caption, columns, frame, search=are_many)


def _label_table(
    classes: tuple[str, ...], target: Array, predicted: Array, split_name: str
) -> Table:
    frame = _detection_frame(target > 0, predicted >= 0.5, predicted, ("average_precision", "auc"))
    frame.insert(0, "label", list(classes))
    columns = (
        Column("label", "label"),
        Column("images", "with it", "count"),
        Column("predicted", "predicted", "count", "at a probability of one half or more"),
        Column("recall", "recall", "share"),
        Column("precision", "precision", "share"),
        Column("f1", "F1", "number"),
        Column("average_precision", "average precision", "number"),
        Column("auc", "AUC", "number"),
    )
    caption = f"Label by label, {split_name}"
    search = len(classes) > MATRIX_CLASSES
    return Table(f"labels-{split_name}", caption, columns, frame, search=search)


def _detection_frame(
    is_class: Mask, is_predicted: Mask, probabilities: Array, metrics: Sequence[str]
) -> pd.DataFrame:
    """Return a row per class or label with counts, ratios and metrics; arguments are (N, C)."""
    hits, images, predicted = (
        (is_class & is_predicted).sum(0),
        is_class.sum(0),
        is_predicted.sum(0),
    )
    frame = pd.DataFrame(
        {
            "images": images,
            "predicted": predicted,
            "recall": _safe_ratio(hits, images),
            "precision": _safe_ratio(hits, predicted),
            "f1": _safe_ratio(2 * hits, images + predicted),
        }
    )
    for metric in metrics:
        frame[metric] = [
            score("multi", is_class[:, [c]], probabilities[:, [c]], metric)
            for c in range(is_class.shape[1])
        ]
    return frame


def _reliability_figure(
    task_kind: str,
    target: Array,
    predicted: Array,
    split_name: str,
    model_name: str,
    table_name: str = "",
) -> Figure:
    """Return the diagram and its table. table_name: of the table, by default `split_name`."""
    if task_kind == "multi":
        confidence, is_correct, count_unit = predicted.ravel(), target.ravel() > 0, "labels"
    else:
        confidence = predicted.max(1)
        is_correct = predicted.argmax(1) == target
        count_unit = "count"  # images or units
    # A probability of 1 belongs into the last bin.
    bin_index = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    bin_index = np.unique(bin_index, return_inverse=True)[1]  # bins that have rows
    bin_counts = np.bincount(bin_index)
    mean_confidence = np.bincount(bin_index, weights=confidence) / bin_counts
    share_right = np.bincount(bin_index, weights=is_correct) / bin_counts
    excess = bin_counts * (mean_confidence - share_right) / max(bin_counts.sum(), 1)
    # Bins that are too sure and not sure enough cancel in the mean excess, and not in the error.
    calibration_error, mean_excess = float(np.abs(excess).sum()), float(excess.sum())
    # Two points are about what chance gives with a few hundred rows.
    if abs(mean_excess) <= 0.02:
        tendency = "about as sure as it is right"
    else:
        tendency = "too sure of itself" if mean_excess > 0 else "less sure than it could be"
    columns = {
        Column("probability", "mean predicted probability", "share"): mean_confidence,
        Column("right", "share right", "share"): share_right,
        Column("rows", count_unit, "count"): bin_counts,
    }
    table_name = table_name or split_name
    caption = f"Reliability, bin by bin ({table_name})"
    return Figure(
        figures.reliability_chart(mean_confidence, share_right, bin_counts, count_unit, model_name),
        f"Reliability diagram: share of right predictions against predicted probability in {BINS} "
        f"bins. {model_name.capitalize()} is {tendency}; the expected calibration error is "
        f"{calibration_error:.3f}.",
        f"Reliability, {split_name}: on the dashed line, 80 % sure is right 80 % of the "
        f"time. {model_name.capitalize()} is {tendency} (expected calibration error "
        f"{calibration_error:.3f}).",
        make_table(f"reliability-{table_name}", caption, columns, sortable=False),
    )


def _regression_blocks(
    classes: tuple[str, ...], target: Array, predicted: Array, split_name: str
) -> list[Block]:
    columns: dict[Column, Any] = {Column("target", "target"): list(classes)}
    for name in metric_names("regression"):
        columns[Column(name, metric_title(name), metric_format(name))] = [
            score("regression", target[:, [i]], predicted[:, [i]], name)
            for i in range(len(classes))
        ]
    bias = Column("bias", "mean error", "number", "predicted less true")
    columns[bias] = (predicted - target).mean(0)
    table = make_table(f"targets-{split_name}", f"Target by target, {split_name}", columns)
    blocks: list[Block] = [table]
    for target_index, target_name in enumerate(classes[:_FIGURE_TARGETS]):
        svg_text = figures.scatter_chart(
            np.asarray(target[:, target_index], float),
            np.asarray(predicted[:, target_index], float),
            xlabel=f"true {target_name}",
            ylabel=f"predicted {target_name}",
        )
        alt_text = (
            f"Predicted against true {target_name}, {count_text(len(target), 'row')}; R² "
            f"{table.frame['r2'][target_index]:.3f}."
        )
        caption = (
            f"{target_name}: predicted against true, {split_name}; on the dashed line they are "
            "equal."
        )
        blocks.append(Figure(svg_text, alt_text, caption))
    return blocks


def _safe_ratio(numerator: Array, denominator: Array) -> Doubles:
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), np.nan)
