"""Scores per unit (patient, slide, sequence), which is predicted from all of its images.

N images, U units, C outputs. Units are in the order of their names. A head that predicts whole
units gives each image the prediction of its unit, which aggregation does not change.
"""

import numpy as np

from headrace.heads.arrays import Array, Index
from headrace.heads.data.task import Task, TaskKind, UnitAggregation
from headrace.heads.evaluate.metrics import all_metrics


def aggregate_units(
    task_kind: TaskKind, predicted: Array, unit_of_row: Array, aggregation: UnitAggregation
) -> Array:
    """Return the predictions of units, (…, U, C), from those of their images, (…, N, C).

    unit_of_row: (N,) integers 0..U-1, each at least once.
    aggregation: "mean": the unweighted average of the images. "max": the largest value of each
    label or number; with two classes the prediction of the image with the largest probability of
    the second one, scikit-learn's positive class; with more classes the largest probability of
    each, scaled to sum to one.

    The dtype stays. nan if an image has nan.
    """
    row_order = np.argsort(unit_of_row, kind="stable")
    ordered = np.asarray(predicted)[..., row_order, :]
    sizes = np.bincount(unit_of_row)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    if aggregation == "mean":
        sums = np.add.reduceat(ordered.astype(np.float64, copy=False), starts, axis=-2)
        return np.asarray((sums / sizes[:, None]).astype(ordered.dtype, copy=False))
    largest = np.maximum.reduceat(ordered, starts, axis=-2)
    if task_kind != "single":
        return largest
    if largest.shape[-1] == 2:
        return np.concatenate([1 - largest[..., 1:], largest[..., 1:]], axis=-1)
    return np.asarray(largest / largest.sum(-1, keepdims=True))


def unit_rows(units: Array) -> tuple[Index, Index]:
    """Return the first row (U,) of each unit, and the unit 0..U-1 of each row (N,)."""
    _, first_rows, unit_of_row = np.unique(units, return_index=True, return_inverse=True)
    return np.asarray(first_rows, np.int64), np.asarray(unit_of_row, np.int64)


def scored_rows(task: Task, rows: Array, predicted: Array) -> tuple[Array, Array]:
    """Return the targets (U, …) and predictions (U, C) of the units of some rows of a task.

    rows: (n,) positions in the task, of whole units; predicted: (n, C) of these rows. Without units
    those of the images themselves are returned.
    """
    if task.units is None:
        return task.target[rows], predicted
    first_rows, unit_of_row = unit_rows(task.units[rows])
    return task.target[rows][first_rows], aggregate_units(
        task.kind, predicted, unit_of_row, task.unit_aggregation
    )


def held_out_metrics(task: Task, fold: int, predicted: Array | None) -> dict[str, float]:
    """Return {metric: value} for the predictions (n, C) of a fold's held-out rows; {} for None."""
    if predicted is None:
        return {}
    return all_metrics(task.kind, *scored_rows(task, np.flatnonzero(task.fold == fold), predicted))
