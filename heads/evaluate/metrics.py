"""Metrics of predictions, with scikit-learn's definitions, of many heads under many weightings.

K heads, N rows, C classes (or label columns, or regression targets), B weightings. A metric that is
a mean over rows is one product of a (K, N) table of row values with an (N, B) table of weights.
Others are computed from a few such products, or, for areas under curves, from sums along rows that
are sorted once. Not scikit-learn's own functions, because a run scores thousands of heads, and
those validate their input anew for each metric.
"""

from dataclasses import dataclass

import numpy as np

from headrace.heads.arrays import Array, Doubles, Index, Mask
from headrace.heads.data.task import TaskKind
from headrace.heads.errors import HeadError

CALIBRATION_BINS = 15  # equal widths over [0, 1], as in Guo et al. 2017
# These sort rows, and cost K × N × B × C operations that are no matrix product.
SORTED_METRICS = ("auc", "average_precision")
# Probabilities are clipped here, so that one row at 0 does not make a mean infinite.
_MIN_PROBABILITY = float(np.finfo(np.float32).eps)


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


def score(task_kind: TaskKind, target: Array, probabilities: Array, metric: str) -> float:
    """Return one metric of one head; nan if it is undefined (AUC with one class).

    target: single (N,) class index; multi (N, L) 0/1; regression (N, L) or (N,).
    probabilities: (N, C), for regression the predicted values.

    Raises HeadError, naming the metrics of this kind of task.
    """
    _check_metric(task_kind, metric)
    if not len(probabilities):
        return float("nan")
    predicted = np.asarray(probabilities, np.float64)[None]
    if metric == "auc" and not np.isfinite(predicted).all():
        return float("nan")  # not the mean over the other classes
    return float(_scores(task_kind, metric, target, predicted, np.ones((len(target), 1)))[0, 0])


def all_metrics(task_kind: TaskKind, target: Array, probabilities: Array) -> dict[str, float]:
    """Return {name: value} of all metrics of the task."""
    predicted = np.asarray(probabilities, np.float64)
    return {name: score(task_kind, target, predicted, name) for name in metric_names(task_kind)}


def sign(metric: str) -> int:
    """Return +1 if higher is better, else -1: multiplied by it, values sort the best head last."""
    return 1 if METRICS[metric].higher_is_better else -1


def row_hits(
    task_kind: TaskKind, target: Array, probabilities: Array, metric: str = "accuracy"
) -> Doubles:
    """Return hits, 0 or 1, whose mean is the metric: accuracy (N,), hamming_accuracy (N, L)."""
    predicted = np.asarray(probabilities, np.float64)
    return np.asarray(_hits(task_kind, metric, target, predicted[None])[0], np.float64)


def row_losses(task_kind: TaskKind, target: Array, probabilities: Array, metric: str) -> Doubles:
    """Return the losses (N,) whose mean is the metric: log_loss (nats) or mae."""
    predicted = np.asarray(probabilities, np.float64)
    return np.asarray(_losses(task_kind, metric, target, predicted[None])[0])


def weighted_scores(
    task_kind: TaskKind,
    target: Array,
    predicted: Array,
    fold_of_row: Array,
    metric: str,
    weights: Array,
) -> Doubles:
    """Return the mean over folds of a metric within each fold, (K, B), with weighted rows.

    target: as in `Task`, N rows; predicted: (K, N, C); fold_of_row: (N,) integers >= 0;
    weights: (N, B) >= 0. With weights of one it is the score of the leaderboard.

    Folds in which the metric is undefined are left out of the mean; nan if it is undefined in all.
    Raises HeadError where `score` does.
    """
    _check_metric(task_kind, metric)
    target = np.asarray(target)
    fold_scores = []
    for fold_number in np.unique(fold_of_row):
        rows = np.flatnonzero(fold_of_row == fold_number)
        fold_weights = weights[rows].astype(np.float64)
        scores = _scores(task_kind, metric, target[rows], predicted[:, rows], fold_weights)
        fold_scores.append(np.where(fold_weights.sum(0) > 0, scores, np.nan))
    return _mean_over(fold_scores)


def _check_metric(task_kind: TaskKind, metric: str) -> None:
    if metric not in METRICS or task_kind not in METRICS[metric].tasks:
        raise HeadError(
            f"metric {metric!r} is not one of a {task_kind} task: choose from "
            f"{', '.join(metric_names(task_kind))}"
        )


def _scores(
    task_kind: TaskKind, metric: str, target: Array, predicted: Array, weights: Doubles
) -> Doubles:
    """Return a metric of predictions (K, n, C) under weights (n, B), (K, B)."""
    if metric in ("accuracy", "hamming_accuracy"):
        hits = _hits(task_kind, metric, target, predicted)
        return _mean(hits if hits.ndim == 2 else hits.mean(2), weights)
    if metric in ("log_loss", "mae"):
        return _mean(_losses(task_kind, metric, target, predicted), weights)
    if task_kind == "single":
        return _single(metric, np.asarray(target).astype(np.int64), predicted, weights)
    predicted = predicted.reshape(*predicted.shape[:2], -1)
    if task_kind == "multi":
        return _multi(metric, _columns(target) >= 0.5, predicted, weights)
    return _regression(metric, _columns(target), predicted, weights)


def _columns(target: Array) -> Doubles:
    """Return labels or values (n,) or (n, C) as (n, C)."""
    return np.asarray(target, np.float64).reshape(len(target), -1)


def _hits(task_kind: TaskKind, metric: str, target: Array, predicted: Array) -> Array:
    """Return where predictions (K, n, C) are right, (K, n), or (K, n, C) for hamming_accuracy."""
    if task_kind == "single":
        return np.asarray(predicted.argmax(2) == target)
    predicted = predicted.reshape(*predicted.shape[:2], -1)
    is_right = (predicted >= 0.5) == (_columns(target) >= 0.5)
    return np.asarray(is_right if metric == "hamming_accuracy" else is_right.all(2))


def _losses(task_kind: TaskKind, metric: str, target: Array, predicted: Array) -> Array:
    """Return the log losses or absolute errors (K, n) of predictions (K, n, C), in their dtype."""
    if task_kind == "single":
        true_class = np.asarray(target).astype(np.int64)[None, :, None]
        of_true_class = np.take_along_axis(predicted, true_class, 2)[..., 0]
        return np.asarray(-np.log(np.clip(of_true_class / predicted.sum(2), _MIN_PROBABILITY, 1)))
    predicted = predicted.reshape(*predicted.shape[:2], -1)
    if metric == "mae":
        return np.asarray(np.abs(predicted - _columns(target)).mean(2))
    of_true_label = np.where(_columns(target) >= 0.5, predicted, 1 - predicted)
    return np.asarray(-np.log(np.clip(of_true_label, _MIN_PROBABILITY, 1)).mean(2))


def _mean(row_values: Array, weights: Doubles) -> Doubles:
    """Return the weighted means (K, B) of row values (K, n) under weights (n, B)."""
    # Divided after the sum: with integer weights and hits of 0 and 1 the sums are exact, so equal
    # heads have exactly equal scores.
    return _ratio(row_values.astype(np.float64, copy=False) @ weights, weights.sum(0))


def _ratio(numerator: Doubles, denominator: Doubles) -> Doubles:
    """Return the ratio, nan where the denominator is 0."""
    return np.asarray(numerator / np.where(denominator > 0, denominator, np.nan))


def _mean_over(column_scores: list[Doubles]) -> Doubles:
    """Return the mean (K, B) of the scores that are defined; nan if none is."""
    stacked_scores = np.stack(column_scores)
    is_finite = np.isfinite(stacked_scores)
    n_finite = is_finite.sum(0)
    return np.where(
        n_finite > 0,
        np.where(is_finite, stacked_scores, 0).sum(0) / np.maximum(n_finite, 1),
        np.nan,
    )


def _single(metric: str, true_class: Index, predicted: Array, weights: Doubles) -> Doubles:
    n_classes = predicted.shape[2]
    if metric == "auc":
        # Of two classes both columns have the same area.
        scored_columns = [1] if n_classes == 2 else range(n_classes)
        columns = _contiguous_columns(predicted)
        return _mean_over([_areas(true_class == c, columns[c], weights) for c in scored_columns])
    predicted_class = predicted.argmax(2)
    is_hit = predicted_class == true_class
    if metric == "calibration_error":
        confidence = np.take_along_axis(predicted, predicted_class[..., None], 2)[..., 0]
        return _calibration(confidence, is_hit, weights)
    class_scores = []
    for c in range(n_classes):
        in_class = true_class == c
        hit_weight = is_hit[:, in_class].astype(np.float64) @ weights[in_class]
        class_weight = weights[in_class].sum(0)
        if metric == "balanced_accuracy":
            class_scores.append(_ratio(hit_weight, class_weight))
        else:
            predicted_weight = (predicted_class == c).astype(np.float64) @ weights
            class_scores.append(_ratio(2 * hit_weight, class_weight + predicted_weight))
    return _mean_over(class_scores)


def _multi(metric: str, true_labels: Mask, predicted: Array, weights: Doubles) -> Doubles:
    labels = range(true_labels.shape[1])
    if metric == "calibration_error":
        flat_predictions = predicted.reshape(len(predicted), -1)
        flat_labels = np.broadcast_to(true_labels.ravel(), flat_predictions.shape)
        return _calibration(flat_predictions, flat_labels, np.repeat(weights, len(labels), axis=0))
    label_scores = {"auc": _areas, "average_precision": _precisions}
    if metric in label_scores:
        columns = _contiguous_columns(predicted)
        return _mean_over(
            [label_scores[metric](true_labels[:, c], columns[c], weights) for c in labels]
        )
    predicted_labels = _contiguous_columns(predicted >= 0.5)
    return _mean_over(
        [_label(metric, true_labels[:, c], predicted_labels[c], weights) for c in labels]
    )


def _contiguous_columns(predicted: Array) -> Array:
    """Return predictions (K, n, C) as (C, K, n), in which a column is read in one piece."""
    return np.ascontiguousarray(np.moveaxis(predicted, 2, 0))


def _label(metric: str, true_label: Mask, predicted_label: Mask, weights: Doubles) -> Doubles:
    """Return the balanced accuracy or F1 of one label, (K, B)."""
    positive_hits = (predicted_label & true_label).astype(np.float64) @ weights
    positive_weight = true_label.astype(np.float64) @ weights
    predicted_weight = predicted_label.astype(np.float64) @ weights
    if metric == "macro_f1":
        # A label that neither occurs nor is predicted counts as 0, as in scikit-learn.
        return np.nan_to_num(_ratio(2 * positive_hits, positive_weight + predicted_weight))
    negative_weight = weights.sum(0) - positive_weight
    negative_hits = negative_weight - (predicted_weight - positive_hits)
    return _mean_over(
        [_ratio(positive_hits, positive_weight), _ratio(negative_hits, negative_weight)]
    )


def _regression(metric: str, target: Doubles, predicted: Array, weights: Doubles) -> Doubles:
    error = predicted - target
    column_scores = []
    for c in range(target.shape[1]):
        residual_mean = _mean(error[:, :, c] ** 2, weights)
        if metric == "rmse":
            column_scores.append(np.sqrt(residual_mean))
            continue
        centered = target[None, :, c] - target[:, c].mean()
        variance = _mean(centered**2, weights) - _mean(centered, weights) ** 2
        # A resample of equal values has a variance of rounding errors only.
        varies = variance > 1e-12 * centered.var()
        # scikit-learn's convention for a constant target: 1 if predicted exactly, else 0.
        of_constant = np.where(residual_mean > 0, 0.0, 1.0)
        column_scores.append(
            np.where(varies, 1 - residual_mean / np.where(varies, variance, 1), of_constant)
        )
    # Of all targets: one whose predictions are not finite is not left out.
    return np.asarray(np.mean(column_scores, axis=0))


def _areas(true_label: Mask, predicted: Array, weights: Doubles) -> Doubles:
    """Return the weighted areas under the ROC curve of one class, (K, B); ties count half."""
    areas = np.full((len(predicted), weights.shape[1]), np.nan)
    n_pairs = weights[true_label].sum(0) * weights[~true_label].sum(0)
    for k, values in enumerate(predicted):
        if np.isfinite(values).all():
            hits, misses = _by_value(values, true_label, weights, rising=True)
            areas[k] = _ratio((hits * (np.cumsum(misses, axis=0) - 0.5 * misses)).sum(0), n_pairs)
    return areas


def _precisions(true_label: Mask, predicted: Array, weights: Doubles) -> Doubles:
    """Return the weighted average precisions of one label, (K, B)."""
    precisions = np.empty((len(predicted), weights.shape[1]))
    positive_weight = weights[true_label].sum(0)
    for k, values in enumerate(predicted):
        hits, misses = _by_value(values, true_label, weights, rising=False)
        hits_so_far = np.cumsum(hits, axis=0)
        rows_so_far = np.maximum(hits_so_far + np.cumsum(misses, axis=0), _MIN_PROBABILITY)
        precisions[k] = _ratio((hits * hits_so_far / rows_so_far).sum(0), positive_weight)
    return precisions


def _by_value(
    values: Array, true_label: Mask, weights: Doubles, *, rising: bool
) -> tuple[Doubles, Doubles]:
    """Return the weights of positives and negatives at each of V distinct values, (V, B) each."""
    order = np.argsort(values if rising else -values)
    ordered, ordered_weights = values[order], weights[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    hits = np.add.reduceat(ordered_weights * true_label[order, None], starts, axis=0)
    return hits, np.add.reduceat(ordered_weights, starts, axis=0) - hits


def _calibration(confidence: Array, is_correct: Array, weights: Doubles) -> Doubles:
    bin_index = np.clip((confidence * CALIBRATION_BINS).astype(np.int64), 0, CALIBRATION_BINS - 1)
    row_excess = confidence.astype(np.float64) - is_correct
    if weights.shape[1] == 1:  # one pass instead of one for each bin: 7 ms instead of 69
        weighted_excess = row_excess * weights[:, 0]
        bin_sums = [
            np.bincount(bins, excess, CALIBRATION_BINS)
            for bins, excess in zip(bin_index, weighted_excess, strict=True)
        ]
        return _ratio(np.abs(bin_sums).sum(1, keepdims=True), weights.sum(0))
    return np.asarray(
        sum(
            np.abs(_mean(np.where(bin_index == b, row_excess, 0), weights))
            for b in range(CALIBRATION_BINS)
        )
    )
