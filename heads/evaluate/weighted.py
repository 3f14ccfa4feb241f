"""Metrics of many heads under many weightings of the same rows, for resampling: matrix products
instead of loops.

K heads, N rows, C classes (labels, targets), B weightings. A metric that is a mean over rows is one
product of a (K, N) table of row values with an (N, B) table of weights; those that are not are made
of a few such products, or, for areas under curves, of sums along rows that are sorted once.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.metrics import CALIBRATION_BINS, METRICS, UnknownMetric, metric_names

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

SORTED_METRICS = ("auc", "average_precision")  # cost K × N × B × C without a matrix product
_SMALLEST = float(np.finfo(np.float32).eps)  # probabilities are clipped there, as in `score`


def weighted_scores(
    task_kind: TaskKind, target: Array, predicted: Array, fold: Array, metric: str, weights: Array
) -> Floats:
    """(K, B) the mean over folds of `metric` within each fold, every row counting as often as its
    weight says.

    target: as in `Task`, N rows; predicted: (K, N, C); fold: (N,) integers >= 0; weights: (N, B) >=
    0. With weights of one it is what the leaderboard ranks by. A fold in which the metric is
    undefined is left out of the mean; nan where it is undefined in all. Raises UnknownMetric.
    """
    if metric not in METRICS or task_kind not in METRICS[metric].tasks:
        raise UnknownMetric(
            f"metric {metric!r} is not one of a {task_kind} task: choose from "
            f"{', '.join(metric_names(task_kind))}"
        )
    total, defined = (
        np.zeros((len(predicted), weights.shape[1])),
        np.zeros((len(predicted), weights.shape[1])),
    )
    for number in np.unique(fold):
        rows = np.flatnonzero(fold == number)
        own = weights[rows].astype(np.float64)
        inside = predicted[:, rows]
        if task_kind == "single":
            values = _single(metric, np.asarray(target)[rows].astype(np.int64), inside, own)
        else:
            wanted = np.asarray(target, np.float64).reshape(len(target), -1)[rows]
            inside = inside.reshape(*inside.shape[:2], -1)
            values = (_multi if task_kind == "multi" else _regression)(metric, wanted, inside, own)
        finite = np.isfinite(values) & (own.sum(0) > 0)
        total += np.where(finite, values, 0)
        defined += finite
    return np.where(defined > 0, total / np.maximum(defined, 1), np.nan)


def _mean(values: Array, weights: Floats) -> Floats:
    """(K, B) weighted means of row values (K, n) under weights (n, B)."""
    mass = weights.sum(0)
    # Sums before division: whole weights of right and wrong give exact counts, so that equal heads
    # are exactly equal.
    sums = values.astype(np.float64, copy=False) @ weights
    return np.where(mass > 0, sums / np.where(mass > 0, mass, 1), np.nan)


def _ratio(top: Floats, bottom: Floats) -> Floats:
    return np.asarray(top / np.where(bottom > 0, bottom, np.nan))


def _mean_over(parts: list[Floats]) -> Floats:
    """The mean over classes of what is defined."""
    stacked = np.stack(parts)
    finite = np.isfinite(stacked)
    count = finite.sum(0)
    return np.where(count > 0, np.where(finite, stacked, 0).sum(0) / np.maximum(count, 1), np.nan)


def _single(
    metric: str, target: npt.NDArray[np.int64], predicted: Array, weights: Floats
) -> Floats:
    classes = predicted.shape[2]
    if metric == "log_loss":
        chosen = np.take_along_axis(predicted, target[None, :, None], 2)[..., 0] / predicted.sum(2)
        return _mean(-np.log(np.clip(chosen, _SMALLEST, 1)), weights)
    if metric == "auc":
        columns = [1] if classes == 2 else range(classes)
        return _mean_over([_areas(target == c, predicted[:, :, c], weights) for c in columns])
    guess = predicted.argmax(2)
    hit = guess == target
    if metric == "accuracy":
        return _mean(hit, weights)
    if metric == "calibration_error":
        confidence = np.take_along_axis(predicted, guess[..., None], 2)[..., 0]
        return _calibration(confidence, hit, weights)
    recalls, scores = [], []
    for c in range(classes):
        own = target == c
        hits = hit[:, own].astype(np.float64) @ weights[own]
        support = weights[own].sum(0)
        recalls.append(_ratio(hits, np.broadcast_to(support, hits.shape)))
        if metric == "macro_f1":
            scores.append(_ratio(2 * hits, support + (guess == c).astype(np.float64) @ weights))
    return _mean_over(recalls if metric == "balanced_accuracy" else scores)


def _multi(metric: str, target: Floats, predicted: Array, weights: Floats) -> Floats:
    truth, guess = target >= 0.5, predicted >= 0.5
    labels = range(target.shape[1])
    if metric == "accuracy":
        return _mean((truth == guess).all(2), weights)
    if metric == "hamming_accuracy":
        return _mean((truth == guess).mean(2), weights)
    if metric == "log_loss":
        chosen = np.where(truth, predicted, 1 - predicted)
        return _mean(-np.log(np.clip(chosen, _SMALLEST, 1)).mean(2), weights)
    if metric == "auc":
        return _mean_over([_areas(truth[:, c], predicted[:, :, c], weights) for c in labels])
    if metric == "average_precision":
        return _mean_over([_precisions(truth[:, c], predicted[:, :, c], weights) for c in labels])
    if metric == "calibration_error":
        flat = predicted.reshape(len(predicted), -1)
        same = np.broadcast_to(truth.ravel(), flat.shape)
        return _calibration(flat, same, np.repeat(weights, target.shape[1], axis=0))
    return _mean_over([_label(metric, truth[:, c], guess[:, :, c], weights) for c in labels])


def _label(
    metric: str, truth: npt.NDArray[np.bool_], guess: npt.NDArray[np.bool_], weights: Floats
) -> Floats:
    """(K, B) balanced accuracy or F1 of one label."""
    hits = guess[:, truth].astype(np.float64) @ weights[truth]
    positives = np.broadcast_to(weights[truth].sum(0), hits.shape)
    if metric == "macro_f1":
        seen = positives + guess.astype(np.float64) @ weights
        return np.where(seen > 0, 2 * hits / np.maximum(seen, _SMALLEST), 0.0)
    rejections = (~guess[:, ~truth]).astype(np.float64) @ weights[~truth]
    negatives = np.broadcast_to(weights[~truth].sum(0), hits.shape)
    return _mean_over([_ratio(hits, positives), _ratio(rejections, negatives)])


def _regression(metric: str, target: Floats, predicted: Array, weights: Floats) -> Floats:
    error = predicted - target
    if metric == "mae":
        return _mean(np.abs(error).mean(2), weights)
    parts = []
    for c in range(target.shape[1]):
        residual = _mean(error[:, :, c] ** 2, weights)
        if metric == "rmse":
            parts.append(np.sqrt(residual))
        else:
            column = target[None, :, c] - target[:, c].mean()
            total = _mean(column**2, weights) - _mean(column, weights) ** 2
            total = np.where(total > 1e-12 * column.var(), total, 0)
            ratio = 1 - residual / np.where(total > 0, total, 1)
            # scikit-learn's convention for a constant target: 1 if predicted exactly, else 0.
            parts.append(np.where(total > 0, ratio, np.where(residual > 0, 0.0, 1.0)))
    return _mean_over(parts)


def _areas(truth: npt.NDArray[np.bool_], predicted: Array, weights: Floats) -> Floats:
    """(K, B) weighted areas under the ROC curve of one class, ties counted half."""
    areas = np.full((len(predicted), weights.shape[1]), np.nan)
    positive, negative = weights[truth].sum(0), weights[~truth].sum(0)
    if not truth.any() or truth.all():
        return areas
    for k, values in enumerate(predicted):
        if np.isfinite(values).all():
            hits, misses = _by_value(values, truth, weights, rising=True)
            wins = (hits * (np.cumsum(misses, axis=0) - 0.5 * misses)).sum(0)
            areas[k] = _ratio(wins, positive * negative)
    return areas


def _precisions(truth: npt.NDArray[np.bool_], predicted: Array, weights: Floats) -> Floats:
    """(K, B) weighted average precisions of one label; one threshold per distinct value."""
    areas = np.full((len(predicted), weights.shape[1]), np.nan)
    if not truth.any():
        return areas
    positive = weights[truth].sum(0)
    for k, values in enumerate(predicted):
        hits, misses = _by_value(values, truth, weights, rising=False)
        found = np.cumsum(hits, axis=0)
        shown = found + np.cumsum(misses, axis=0)
        areas[k] = _ratio((hits * found / np.maximum(shown, _SMALLEST)).sum(0), positive)
    return areas


def _by_value(
    values: Array, truth: npt.NDArray[np.bool_], weights: Floats, *, rising: bool
) -> tuple[Floats, Floats]:
    """(V, B) twice: the weight of positives and of negatives at each of the V distinct values, in
    order.
    """
    order = np.argsort(values if rising else -values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    own = weights[order]
    hits = np.add.reduceat(own * truth[order, None], starts, axis=0)
    return hits, np.add.reduceat(own, starts, axis=0) - hits


def _calibration(confidence: Array, correct: Array, weights: Floats) -> Floats:
    bins = np.clip((confidence * CALIBRATION_BINS).astype(np.int64), 0, CALIBRATION_BINS - 1)
    excess = confidence.astype(np.float64) - correct
    return np.asarray(
        sum(np.abs(_mean(np.where(bins == b, excess, 0), weights)) for b in range(CALIBRATION_BINS))
    )
