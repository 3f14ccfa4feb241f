"""What a head's predictions are worth: every metric of a task, computed with array operations only.

N rows, C classes (or label columns, or regression targets). scikit-learn's definitions; the tests
compare with it. Written out here because a run scores thousands of heads and scikit-learn validates
its input anew for each metric.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.errors import HeadraceError
from headrace.heads.data.task import TaskKind

Floats = npt.NDArray[np.float64]

CALIBRATION_BINS = 15  # equal widths over [0, 1], as in Guo et al. 2017


class UnknownMetric(HeadraceError, ValueError):
    """The metric does not exist, or not for this kind of task."""


@dataclass(frozen=True)
class Metric:
    """One number about a head: which way is better, and which kinds of task have it."""

    higher_is_better: bool
    tasks: tuple[TaskKind, ...]


METRICS: dict[str, Metric] = {
    "accuracy": Metric(True, ("single", "multi")),  # multi: every label of the row right
    "balanced_accuracy": Metric(True, ("single", "multi")),  # multi: mean over labels
    "log_loss": Metric(False, ("single", "multi")),  # nats; multi: mean over labels
    "auc": Metric(
        True, ("single", "multi")
    ),  # one against the rest, mean over classes that have both
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
    """The metrics that this kind of task has."""
    return tuple(name for name, metric in METRICS.items() if task_kind in metric.tasks)


def score(
    task_kind: TaskKind, target: npt.NDArray[Any], probabilities: npt.NDArray[Any], metric: str
) -> float:
    """One metric of one head. target: single (N,) class index; multi (N, L) 0/1; regression (N, L)
    or (N,).

    probabilities: (N, C), for regression the predicted values. nan where the metric is undefined
    (AUC with one class). Raises UnknownMetric, naming the metrics of this kind of task.
    """
    if metric not in METRICS or task_kind not in METRICS[metric].tasks:
        raise UnknownMetric(
            f"metric {metric!r} is not one of a {task_kind} task: choose from "
            f"{', '.join(metric_names(task_kind))}"
        )
    predicted = np.asarray(probabilities, np.float64)
    if task_kind == "single":
        return _single(metric, np.asarray(target).astype(np.int64), predicted)
    wanted = np.asarray(target, np.float64)
    wanted, predicted = wanted.reshape(len(wanted), -1), predicted.reshape(len(predicted), -1)
    return (
        _multi(metric, wanted, predicted)
        if task_kind == "multi"
        else _regression(metric, wanted, predicted)
    )


def all_metrics(
    task_kind: TaskKind, target: npt.NDArray[Any], probabilities: npt.NDArray[Any]
) -> dict[str, float]:
    """Every metric of the task, by name."""
    return {name: score(task_kind, target, probabilities, name) for name in metric_names(task_kind)}


def sign(metric: str) -> int:
    """+1 where higher is better, -1 where lower is: multiply by it to sort the best head last."""
    return 1 if METRICS[metric].higher_is_better else -1


def row_hits(
    task_kind: TaskKind,
    target: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    metric: str = "accuracy",
) -> Floats:
    """0 and 1 whose mean is the metric: accuracy (N,), hamming_accuracy (N, L)."""
    predicted = np.asarray(probabilities, np.float64)
    if task_kind == "single":
        return np.asarray(predicted.argmax(1) == target, np.float64)
    wanted = np.asarray(target, np.float64).reshape(len(predicted), -1)
    same = (predicted.reshape(len(predicted), -1) >= 0.5) == (wanted >= 0.5)
    return np.asarray(same if metric == "hamming_accuracy" else same.all(1), np.float64)


def row_losses(
    task_kind: TaskKind, target: npt.NDArray[Any], probabilities: npt.NDArray[Any], metric: str
) -> Floats:
    """(N,) losses whose mean is the metric: log_loss (nats) or mae."""
    predicted = np.asarray(probabilities, np.float64)
    smallest = np.finfo(np.float32).eps
    if task_kind == "single":
        chosen = predicted[
            np.arange(len(predicted)), np.asarray(target).astype(np.int64)
        ] / predicted.sum(1)
        return np.asarray(-np.log(np.clip(chosen, smallest, 1)))
    wanted = np.asarray(target, np.float64).reshape(len(predicted), -1)
    predicted = predicted.reshape(len(predicted), -1)
    if metric == "mae":
        return np.asarray(np.abs(predicted - wanted).mean(1))
    return np.asarray(
        -np.log(np.clip(np.where(wanted >= 0.5, predicted, 1 - predicted), smallest, 1)).mean(1)
    )


def _single(metric: str, target: npt.NDArray[np.int64], predicted: Floats) -> float:
    rows, classes = predicted.shape
    if rows == 0:
        return float("nan")
    guess = predicted.argmax(1)
    if metric == "accuracy":
        return float((guess == target).mean())
    if metric == "log_loss":
        chosen = predicted[np.arange(rows), target] / predicted.sum(1)
        return float(-np.log(np.clip(chosen, np.finfo(np.float32).eps, 1)).mean())
    if metric == "auc":
        onehot = target[:, None] == np.arange(classes)
        # Two classes: the two one-against-rest areas are equal, so the second says it all.
        return _area(onehot[:, 1:], predicted[:, 1:]) if classes == 2 else _area(onehot, predicted)
    if metric == "calibration_error":
        confidence = predicted[np.arange(rows), guess]
        return _calibration(confidence, guess == target)
    support = np.bincount(target, minlength=classes)
    hits = np.bincount(target[guess == target], minlength=classes)
    if metric == "balanced_accuracy":
        return float((hits[support > 0] / support[support > 0]).mean())
    seen = support + np.bincount(
        guess, minlength=classes
    )  # macro_f1: classes that occur in target or prediction
    return float((2 * hits[seen > 0] / seen[seen > 0]).mean())


def _multi(metric: str, target: Floats, predicted: Floats) -> float:
    if len(predicted) == 0:
        return float("nan")
    truth, guess = target >= 0.5, predicted >= 0.5
    if metric == "accuracy":
        return float((truth == guess).all(1).mean())
    if metric == "hamming_accuracy":
        return float((truth == guess).mean())
    if metric == "log_loss":
        chosen = np.where(truth, predicted, 1 - predicted)
        return float(-np.log(np.clip(chosen, np.finfo(np.float32).eps, 1)).mean())
    if metric == "auc":
        return _area(truth, predicted)
    if metric == "average_precision":
        return _average_precision(truth, predicted)
    if metric == "calibration_error":
        return _calibration(predicted.ravel(), truth.ravel())
    hits = (truth & guess).sum(0)
    if metric == "macro_f1":
        seen = truth.sum(0) + guess.sum(0)
        return float(np.where(seen > 0, 2 * hits / np.maximum(seen, 1), 0.0).mean())
    positives, negatives = truth.sum(0), (~truth).sum(0)
    rejections = (~truth & ~guess).sum(0)
    recalls = np.stack([hits / np.maximum(positives, 1), rejections / np.maximum(negatives, 1)])
    present = np.stack([positives > 0, negatives > 0])
    return float(((recalls * present).sum(0) / present.sum(0)).mean())


def _regression(metric: str, target: Floats, predicted: Floats) -> float:
    if len(predicted) == 0:
        return float("nan")
    error = predicted - target
    if metric == "rmse":
        return float(np.sqrt((error**2).mean(0)).mean())
    if metric == "mae":
        return float(np.abs(error).mean())
    residual, total = (error**2).sum(0), ((target - target.mean(0)) ** 2).sum(0)
    # scikit-learn's convention for a constant target: 1 if predicted exactly, else 0.
    per_target = np.where(
        total > 0, 1 - residual / np.where(total > 0, total, 1), np.where(residual > 0, 0.0, 1.0)
    )
    return float(per_target.mean())


def _area(truth: npt.NDArray[np.bool_], predicted: Floats) -> float:
    """Mean over columns of the area under the ROC curve, by ranks (Mann-Whitney), ties counted
    half; nan without a column that has both positives and negatives.
    """
    positives = truth.sum(0)
    usable = (positives > 0) & (positives < len(truth))
    if not usable.any() or not np.isfinite(predicted).all():
        return float("nan")
    truth, predicted, positives = truth[:, usable], predicted[:, usable], positives[usable]
    ranks = np.stack([_ranks(column) for column in predicted.T], axis=1)
    wins = (ranks * truth).sum(0) - positives * (positives + 1) / 2
    return float((wins / (positives * (len(truth) - positives))).mean())


def _ranks(values: Floats) -> npt.NDArray[np.float64]:
    """Ranks from 1, those of equal values their mean.

    (scipy.stats has a function for it, and takes a second to import.)
    """
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: npt.NDArray[np.float64] = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def _average_precision(truth: npt.NDArray[np.bool_], predicted: Floats) -> float:
    usable = truth.any(0)
    if not usable.any():
        return float("nan")
    areas = []
    for column in np.flatnonzero(usable):
        order = np.argsort(-predicted[:, column], kind="stable")
        values, hit = predicted[order, column], truth[order, column]
        last = np.append(values[1:] != values[:-1], True)  # one threshold per distinct value
        found = np.cumsum(hit)[last]
        precision = found / (np.flatnonzero(last) + 1)
        areas.append(np.sum(np.diff(found, prepend=0) * precision) / found[-1])
    return float(np.mean(areas))


def _calibration(confidence: Floats, correct: npt.NDArray[np.bool_]) -> float:
    bins = np.clip((confidence * CALIBRATION_BINS).astype(np.int64), 0, CALIBRATION_BINS - 1)
    excess = np.bincount(bins, weights=confidence - correct, minlength=CALIBRATION_BINS)
    return float(np.abs(excess).sum() / len(confidence))
