"""Metrics of predictions, with scikit-learn's definitions.

N rows, C classes (or label columns, or regression targets). Not scikit-learn's own functions,
because a run scores thousands of heads, and those validate their input anew for each metric.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.data.task import TaskKind
from headrace.heads.errors import HeadError

Floats = npt.NDArray[np.float64]

CALIBRATION_BINS = 15  # equal widths over [0, 1], as in Guo et al. 2017


@dataclass(frozen=True)
class Metric:
    """Properties of a metric."""

    higher_is_better: bool
    tasks: tuple[TaskKind, ...]


METRICS: dict[str, Metric] = {
    "accuracy": Metric(True, ("single", "multi")),  # multi: every label of the row right
    "balanced_accuracy": Metric(True, ("single", "multi")),  # multi: mean over labels
    "log_loss": Metric(False, ("single", "multi")),  # nats; multi: mean over labels
    # One against the rest, mean over classes with both positives and negatives.
    "auc": Metric(True, ("single", "multi")),
    "macro_f1": Metric(True, ("single", "multi")),
    "average_precision": Metric(True, ("multi",)),  # mean over labels that occur ("mAP")
    "hamming_accuracy": Metric(True, ("multi",)),  # share of single labels right
    "calibration_error": Metric(False, ("single", "multi")),  # expected calibration error, 15 bins
    "r2": Metric(True, ("regression",)),  # mean over targets
    "rmse": Metric(False, ("regression",)),
    "mae": Metric(False, ("regression",)),
}

DEFAULT_METRIC: dict[TaskKind, str] = {
    "single": "accuracy",
    "multi": "average_precision",
    "regression": "r2",
}


def metric_names(task_kind: TaskKind) -> tuple[str, ...]:
    """Return the metrics of a kind of task."""
    return tuple(name for name, metric in METRICS.items() if task_kind in metric.tasks)


def score(
    task_kind: TaskKind, target: npt.NDArray[Any], probabilities: npt.NDArray[Any], metric: str
) -> float:
    """Return one metric of one head; nan if it is undefined (AUC with one class).

    target: single (N,) class index; multi (N, L) 0/1; regression (N, L) or (N,).
    probabilities: (N, C), for regression the predicted values.

    Raises HeadError, naming the metrics of this kind of task.
    """
    if metric not in METRICS or task_kind not in METRICS[metric].tasks:
        raise HeadError(
            f"metric {metric!r} is not one of a {task_kind} task: choose from "
            f"{', '.join(metric_names(task_kind))}"
        )
    predicted = np.asarray(probabilities, np.float64)
    if task_kind == "single":
        return _single(metric, np.asarray(target).astype(np.int64), predicted)
    true_values = np.asarray(target, np.float64)
    true_values = true_values.reshape(len(true_values), -1)
    predicted = predicted.reshape(len(predicted), -1)
    return (
        _multi(metric, true_values, predicted)
        if task_kind == "multi"
        else _regression(metric, true_values, predicted)
    )


def all_metrics(
    task_kind: TaskKind, target: npt.NDArray[Any], probabilities: npt.NDArray[Any]
) -> dict[str, float]:
    """Return {name: value} of all metrics of the task."""
    return {name: score(task_kind, target, probabilities, name) for name in metric_names(task_kind)}


def sign(metric: str) -> int:
    """Return +1 if higher is better, else -1: multiplied by it, values sort the best head last."""
    return 1 if METRICS[metric].higher_is_better else -1


def row_hits(
    task_kind: TaskKind,
    target: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    metric: str = "accuracy",
) -> Floats:
    """Return hits, 0 or 1, whose mean is the metric: accuracy (N,), hamming_accuracy (N, L)."""
    predicted = np.asarray(probabilities, np.float64)
    if task_kind == "single":
        return np.asarray(predicted.argmax(1) == target, np.float64)
    true_values = np.asarray(target, np.float64).reshape(len(predicted), -1)
    is_right = (predicted.reshape(len(predicted), -1) >= 0.5) == (true_values >= 0.5)
    return np.asarray(is_right if metric == "hamming_accuracy" else is_right.all(1), np.float64)


def row_losses(
    task_kind: TaskKind, target: npt.NDArray[Any], probabilities: npt.NDArray[Any], metric: str
) -> Floats:
    """Return the losses (N,) whose mean is the metric: log_loss (nats) or mae."""
    predicted = np.asarray(probabilities, np.float64)
    smallest_probability = np.finfo(np.float32).eps
    if task_kind == "single":
        true_class_probability = predicted[
            np.arange(len(predicted)), np.asarray(target).astype(np.int64)
        ] / predicted.sum(1)
        return np.asarray(-np.log(np.clip(true_class_probability, smallest_probability, 1)))
    true_values = np.asarray(target, np.float64).reshape(len(predicted), -1)
    predicted = predicted.reshape(len(predicted), -1)
    if metric == "mae":
        return np.asarray(np.abs(predicted - true_values).mean(1))
    return np.asarray(
        -np.log(
            np.clip(np.where(true_values >= 0.5, predicted, 1 - predicted), smallest_probability, 1)
        ).mean(1)
    )


def _single(metric: str, true_class: npt.NDArray[np.int64], predicted: Floats) -> float:
    n_rows, n_classes = predicted.shape
    if n_rows == 0:
        return float("nan")
    predicted_class = predicted.argmax(1)
    if metric == "accuracy":
        return float((predicted_class == true_class).mean())
    if metric == "log_loss":
        return float(row_losses("single", true_class, predicted, metric).mean())
    if metric == "auc":
        one_hot = true_class[:, None] == np.arange(n_classes)
        # Of two classes the areas of both are equal, so one is computed.
        return (
            _area(one_hot[:, 1:], predicted[:, 1:]) if n_classes == 2 else _area(one_hot, predicted)
        )
    if metric == "calibration_error":
        confidence = predicted[np.arange(n_rows), predicted_class]
        return _calibration(confidence, predicted_class == true_class)
    class_counts = np.bincount(true_class, minlength=n_classes)
    class_hits = np.bincount(true_class[predicted_class == true_class], minlength=n_classes)
    if metric == "balanced_accuracy":
        return float((class_hits[class_counts > 0] / class_counts[class_counts > 0]).mean())
    # macro_f1, over classes that occur in target or prediction.
    f1_denominator = class_counts + np.bincount(predicted_class, minlength=n_classes)
    return float((2 * class_hits[f1_denominator > 0] / f1_denominator[f1_denominator > 0]).mean())


def _multi(metric: str, target: Floats, predicted: Floats) -> float:
    if len(predicted) == 0:
        return float("nan")
    true_labels, predicted_labels = target >= 0.5, predicted >= 0.5
    if metric == "accuracy":
        return float((true_labels == predicted_labels).all(1).mean())
    if metric == "hamming_accuracy":
        return float((true_labels == predicted_labels).mean())
    if metric == "log_loss":
        true_label_probability = np.where(true_labels, predicted, 1 - predicted)
        return float(-np.log(np.clip(true_label_probability, np.finfo(np.float32).eps, 1)).mean())
    if metric == "auc":
        return _area(true_labels, predicted)
    if metric == "average_precision":
        return _average_precision(true_labels, predicted)
    if metric == "calibration_error":
        return _calibration(predicted.ravel(), true_labels.ravel())
    true_positives = (true_labels & predicted_labels).sum(0)
    if metric == "macro_f1":
        f1_denominator = true_labels.sum(0) + predicted_labels.sum(0)
        return float(
            np.where(
                f1_denominator > 0, 2 * true_positives / np.maximum(f1_denominator, 1), 0.0
            ).mean()
        )
    positives, negatives = true_labels.sum(0), (~true_labels).sum(0)
    true_negatives = (~true_labels & ~predicted_labels).sum(0)
    class_recalls = np.stack(
        [true_positives / np.maximum(positives, 1), true_negatives / np.maximum(negatives, 1)]
    )
    is_present = np.stack([positives > 0, negatives > 0])
    return float(((class_recalls * is_present).sum(0) / is_present.sum(0)).mean())


def _regression(metric: str, target: Floats, predicted: Floats) -> float:
    if len(predicted) == 0:
        return float("nan")
    error = predicted - target
    if metric == "rmse":
        return float(np.sqrt((error**2).mean(0)).mean())
    if metric == "mae":
        return float(np.abs(error).mean())
    residual_squares, total_squares = (error**2).sum(0), ((target - target.mean(0)) ** 2).sum(0)
    # scikit-learn's convention for a constant target: 1 if predicted exactly, else 0.
    per_target = np.where(
        total_squares > 0,
        1 - residual_squares / np.where(total_squares > 0, total_squares, 1),
        np.where(residual_squares > 0, 0.0, 1.0),
    )
    return float(per_target.mean())


def _area(true_labels: npt.NDArray[np.bool_], predicted: Floats) -> float:
    """Return the mean over columns of the area under the ROC curve, by ranks (Mann-Whitney).

    Ties count half. nan if no column has both positives and negatives.
    """
    positives = true_labels.sum(0)
    has_both_sides = (positives > 0) & (positives < len(true_labels))
    if not has_both_sides.any() or not np.isfinite(predicted).all():
        return float("nan")
    true_labels = true_labels[:, has_both_sides]
    predicted = predicted[:, has_both_sides]
    positives = positives[has_both_sides]
    column_ranks = np.stack([_ranks(column) for column in predicted.T], axis=1)
    n_wins = (column_ranks * true_labels).sum(0) - positives * (positives + 1) / 2
    return float((n_wins / (positives * (len(true_labels) - positives))).mean())


def _ranks(values: Floats) -> npt.NDArray[np.float64]:
    """Return ranks from 1; equal values have their mean rank."""
    # Not scipy.stats.rankdata, which takes a second to import.
    _, value_index, value_counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_ranks: npt.NDArray[np.float64] = (np.cumsum(value_counts) - (value_counts - 1) / 2)[
        value_index
    ]
    return mean_ranks


def _average_precision(true_labels: npt.NDArray[np.bool_], predicted: Floats) -> float:
    has_positives = true_labels.any(0)
    if not has_positives.any():
        return float("nan")
    column_areas = []
    for column in np.flatnonzero(has_positives):
        order = np.argsort(-predicted[:, column], kind="stable")
        sorted_values, is_hit = predicted[order, column], true_labels[order, column]
        # One threshold per distinct value.
        is_threshold = np.append(sorted_values[1:] != sorted_values[:-1], True)
        n_found = np.cumsum(is_hit)[is_threshold]
        precision = n_found / (np.flatnonzero(is_threshold) + 1)
        column_areas.append(np.sum(np.diff(n_found, prepend=0) * precision) / n_found[-1])
    return float(np.mean(column_areas))


def _calibration(confidence: Floats, is_correct: npt.NDArray[np.bool_]) -> float:
    bin_index = np.clip((confidence * CALIBRATION_BINS).astype(np.int64), 0, CALIBRATION_BINS - 1)
    bin_excess = np.bincount(bin_index, weights=confidence - is_correct, minlength=CALIBRATION_BINS)
    return float(np.abs(bin_excess).sum() / len(confidence))
