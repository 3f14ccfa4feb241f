"""Metrics of many heads under many weightings of the rows, for resampling.

K heads, N rows, C classes (labels, targets), B weightings. A metric that is a mean over rows is one
product of a (K, N) table of row values with an (N, B) table of weights. Others are computed from a
few such products, or, for areas under curves, from sums along rows that are sorted once.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.data.task import TaskKind
from headrace.heads.errors import HeadError
from headrace.heads.evaluate.metrics import CALIBRATION_BINS, METRICS, metric_names

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

# These sort rows, and cost K × N × B × C operations that are no matrix product.
SORTED_METRICS = ("auc", "average_precision")
_SMALLEST = float(np.finfo(np.float32).eps)  # probabilities are clipped here, as in `score`


def weighted_scores(
    task_kind: TaskKind,
    target: Array,
    predicted: Array,
    fold_of_row: Array,
    metric: str,
    weights: Array,
) -> Floats:
    """Return the mean over folds of a metric within each fold, (K, B), with weighted rows.

    target: as in `Task`, N rows; predicted: (K, N, C); fold_of_row: (N,) integers >= 0;
    weights: (N, B) >= 0. With weights of one it is the score of the leaderboard.

    Folds in which the metric is undefined are left out of the mean; nan if it is undefined in all.
    Raises HeadError.
    """
    if metric not in METRICS or task_kind not in METRICS[metric].tasks:
        raise HeadError(
            f"metric {metric!r} is not one of a {task_kind} task: choose from "
            f"{', '.join(metric_names(task_kind))}"
        )
    score_sum = np.zeros((len(predicted), weights.shape[1]))
    n_defined = np.zeros((len(predicted), weights.shape[1]))
    for fold_number in np.unique(fold_of_row):
        fold_rows = np.flatnonzero(fold_of_row == fold_number)
        fold_weights = weights[fold_rows].astype(np.float64)
        fold_predictions = predicted[:, fold_rows]
        if task_kind == "single":
            fold_scores = _single(
                metric,
                np.asarray(target)[fold_rows].astype(np.int64),
                fold_predictions,
                fold_weights,
            )
        else:
            true_values = np.asarray(target, np.float64).reshape(len(target), -1)[fold_rows]
            fold_predictions = fold_predictions.reshape(*fold_predictions.shape[:2], -1)
            fold_scores = (_multi if task_kind == "multi" else _regression)(
                metric, true_values, fold_predictions, fold_weights
            )
        is_finite = np.isfinite(fold_scores) & (fold_weights.sum(0) > 0)
        score_sum += np.where(is_finite, fold_scores, 0)
        n_defined += is_finite
    return np.where(n_defined > 0, score_sum / np.maximum(n_defined, 1), np.nan)


def _mean(row_values: Array, weights: Floats) -> Floats:
    """Return the weighted means (K, B) of row values (K, n) under weights (n, B)."""
    total_weight = weights.sum(0)
    # Divided after the sum: with integer weights and hits of 0 and 1 the sums are exact, so equal
    # heads have exactly equal scores.
    weighted_sums = row_values.astype(np.float64, copy=False) @ weights
    return np.where(
        total_weight > 0, weighted_sums / np.where(total_weight > 0, total_weight, 1), np.nan
    )


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    return np.asarray(numerator / np.where(denominator > 0, denominator, np.nan))


def _mean_over(column_scores: list[Floats]) -> Floats:
    """Return the mean over classes, (K, B), of the scores that are defined."""
    stacked_scores = np.stack(column_scores)
    is_finite = np.isfinite(stacked_scores)
    n_finite = is_finite.sum(0)
    return np.where(
        n_finite > 0,
        np.where(is_finite, stacked_scores, 0).sum(0) / np.maximum(n_finite, 1),
        np.nan,
    )


def _single(
    metric: str, true_class: npt.NDArray[np.int64], predicted: Array, weights: Floats
) -> Floats:
    n_classes = predicted.shape[2]
    if metric == "log_loss":
        true_class_probability = np.take_along_axis(predicted, true_class[None, :, None], 2)[
            ..., 0
        ] / predicted.sum(2)
        return _mean(-np.log(np.clip(true_class_probability, _SMALLEST, 1)), weights)
    if metric == "auc":
        # Of two classes both columns have the same area.
        scored_columns = [1] if n_classes == 2 else range(n_classes)
        return _mean_over(
            [_areas(true_class == c, predicted[:, :, c], weights) for c in scored_columns]
        )
    predicted_class = predicted.argmax(2)
    is_hit = predicted_class == true_class
    if metric == "accuracy":
        return _mean(is_hit, weights)
    if metric == "calibration_error":
        confidence = np.take_along_axis(predicted, predicted_class[..., None], 2)[..., 0]
        return _calibration(confidence, is_hit, weights)
    class_recalls, class_f1 = [], []
    for c in range(n_classes):
        in_class = true_class == c
        hit_weight = is_hit[:, in_class].astype(np.float64) @ weights[in_class]
        class_weight = weights[in_class].sum(0)
        class_recalls.append(_ratio(hit_weight, np.broadcast_to(class_weight, hit_weight.shape)))
        if metric == "macro_f1":
            class_f1.append(
                _ratio(
                    2 * hit_weight,
                    class_weight + (predicted_class == c).astype(np.float64) @ weights,
                )
            )
    return _mean_over(class_recalls if metric == "balanced_accuracy" else class_f1)


def _multi(metric: str, target: Floats, predicted: Array, weights: Floats) -> Floats:
    true_labels, predicted_labels = target >= 0.5, predicted >= 0.5
    labels = range(target.shape[1])
    if metric == "accuracy":
        return _mean((true_labels == predicted_labels).all(2), weights)
    if metric == "hamming_accuracy":
        return _mean((true_labels == predicted_labels).mean(2), weights)
    if metric == "log_loss":
        true_label_probability = np.where(true_labels, predicted, 1 - predicted)
        return _mean(-np.log(np.clip(true_label_probability, _SMALLEST, 1)).mean(2), weights)
    if metric == "auc":
        return _mean_over([_areas(true_labels[:, c], predicted[:, :, c], weights) for c in labels])
    if metric == "average_precision":
        return _mean_over(
            [_precisions(true_labels[:, c], predicted[:, :, c], weights) for c in labels]
        )
    if metric == "calibration_error":
        flat_predictions = predicted.reshape(len(predicted), -1)
        flat_labels = np.broadcast_to(true_labels.ravel(), flat_predictions.shape)
        return _calibration(
            flat_predictions, flat_labels, np.repeat(weights, target.shape[1], axis=0)
        )
    return _mean_over(
        [_label(metric, true_labels[:, c], predicted_labels[:, :, c], weights) for c in labels]
    )


def _label(
    metric: str,
    true_label: npt.NDArray[np.bool_],
    predicted_label: npt.NDArray[np.bool_],
    weights: Floats,
) -> Floats:
    """Return the balanced accuracy or F1 of one label, (K, B)."""
    positive_hits = predicted_label[:, true_label].astype(np.float64) @ weights[true_label]
    positive_weight = np.broadcast_to(weights[true_label].sum(0), positive_hits.shape)
    if metric == "macro_f1":
        f1_denominator = positive_weight + predicted_label.astype(np.float64) @ weights
        return np.where(
            f1_denominator > 0, 2 * positive_hits / np.maximum(f1_denominator, _SMALLEST), 0.0
        )
    negative_hits = (~predicted_label[:, ~true_label]).astype(np.float64) @ weights[~true_label]
    negative_weight = np.broadcast_to(weights[~true_label].sum(0), positive_hits.shape)
    return _mean_over(
        [_ratio(positive_hits, positive_weight), _ratio(negative_hits, negative_weight)]
    )


def _regression(metric: str, target: Floats, predicted: Array, weights: Floats) -> Floats:
    error = predicted - target
    if metric == "mae":
        return _mean(np.abs(error).mean(2), weights)
    column_scores = []
    for c in range(target.shape[1]):
        residual_mean = _mean(error[:, :, c] ** 2, weights)
        if metric == "rmse":
            column_scores.append(np.sqrt(residual_mean))
        else:
            centered_target = target[None, :, c] - target[:, c].mean()
            total_variance = (
                _mean(centered_target**2, weights) - _mean(centered_target, weights) ** 2
            )
            # A resample of equal values has a variance of rounding errors only.
            total_variance = np.where(
                total_variance > 1e-12 * centered_target.var(), total_variance, 0
            )
            explained_share = 1 - residual_mean / np.where(total_variance > 0, total_variance, 1)
            # scikit-learn's convention for a constant target: 1 if predicted exactly, else 0.
            column_scores.append(
                np.where(total_variance > 0, explained_share, np.where(residual_mean > 0, 0.0, 1.0))
            )
    return _mean_over(column_scores)


def _areas(true_label: npt.NDArray[np.bool_], predicted: Array, weights: Floats) -> Floats:
    """Return the weighted areas under the ROC curve of one class, (K, B); ties count half."""
    head_areas = np.full((len(predicted), weights.shape[1]), np.nan)
    positive_weight, negative_weight = weights[true_label].sum(0), weights[~true_label].sum(0)
    if not true_label.any() or true_label.all():
        return head_areas
    for k, head_predictions in enumerate(predicted):
        if np.isfinite(head_predictions).all():
            hit_weights, miss_weights = _by_value(
                head_predictions, true_label, weights, rising=True
            )
            win_weight = (hit_weights * (np.cumsum(miss_weights, axis=0) - 0.5 * miss_weights)).sum(
                0
            )
            head_areas[k] = _ratio(win_weight, positive_weight * negative_weight)
    return head_areas


def _precisions(true_label: npt.NDArray[np.bool_], predicted: Array, weights: Floats) -> Floats:
    """Return the weighted average precisions of one label, (K, B)."""
    head_areas = np.full((len(predicted), weights.shape[1]), np.nan)
    if not true_label.any():
        return head_areas
    positive_weight = weights[true_label].sum(0)
    for k, head_predictions in enumerate(predicted):
        hit_weights, miss_weights = _by_value(head_predictions, true_label, weights, rising=False)
        hits_so_far = np.cumsum(hit_weights, axis=0)
        rows_so_far = hits_so_far + np.cumsum(miss_weights, axis=0)
        head_areas[k] = _ratio(
            (hit_weights * hits_so_far / np.maximum(rows_so_far, _SMALLEST)).sum(0), positive_weight
        )
    return head_areas


def _by_value(
    values: Array, true_label: npt.NDArray[np.bool_], weights: Floats, *, rising: bool
) -> tuple[Floats, Floats]:
    """Return the weights of positives and negatives at each of V distinct values, (V, B) each."""
    value_order = np.argsort(values if rising else -values, kind="stable")
    ordered_values = values[value_order]
    value_starts = np.flatnonzero(np.append(True, ordered_values[1:] != ordered_values[:-1]))
    ordered_weights = weights[value_order]
    hit_weights = np.add.reduceat(
        ordered_weights * true_label[value_order, None], value_starts, axis=0
    )
    return hit_weights, np.add.reduceat(ordered_weights, value_starts, axis=0) - hit_weights


def _calibration(confidence: Array, is_correct: Array, weights: Floats) -> Floats:
    bin_index = np.clip((confidence * CALIBRATION_BINS).astype(np.int64), 0, CALIBRATION_BINS - 1)
    row_excess = confidence.astype(np.float64) - is_correct
    return np.asarray(
        sum(
            np.abs(_mean(np.where(bin_index == b, row_excess, 0), weights))
            for b in range(CALIBRATION_BINS)
        )
    )
