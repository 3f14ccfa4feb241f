"""The temperature of a classifier: one number that its log-odds are divided by, so that it is right
as often as it is sure.

N rows, C outputs, K heads. Above 1 the head was too sure, below 1 not sure enough (Guo, Pleiss, Sun
and Weinberger 2017, "On calibration of modern neural networks"). A positive number keeps every
decision: the largest probability stays the largest, a label at one half or more stays there.

It is fitted on out-of-fold predictions, by their log loss: the expected calibration error has bins,
jumps, and a least value that says nothing (the same share of each class for all rows). The loss is
convex in 1 / T. A head whose folds are all right would have T = 0, one that knows nothing T = ∞,
and gradient steps run away towards both; a few rows decide nothing at all. So log T has a normal
prior around 0 (`SPREAD`), and the root is found between fixed ends.

Heads that tell log-odds divide those (`predict_head`). Others tell probabilities alone: p becomes
p^(1/T), scaled to sum to one. A class that none of five neighbours has is at exactly 0, which no
power changes, and one such row that is of that class would drive T to any height: zeros of votes
are taken for about one vote in a hundred (`vote_floor`), others for `FLOOR`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.data.task import TaskKind

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

# smaller probabilities are taken for it, by the fit and wherever a temperature is applied
FLOOR = 1e-12
# The same of votes. On digits, wine and breast_cancer, 60 to 900 images, 1, 5 and 15 neighbours and
# forests of 50 trees, 0.01 has the least log loss of all from 1e-12 to 0.01, and nearly always the
# least calibration error; that of five neighbours on 150 digits is 5.6 points with it, 6.4 as they
# are, 14.5 with 1e-12.
VOTE_FLOOR = 0.01
# The same limit on log-odds, and on how far a class's logit lies behind the largest one.
FARTHEST = -math.log(FLOOR)
LOWEST, HIGHEST = 0.02, 50.0  # a ridge head of a thousand classes needs 0.05
# Standard deviation of log T before anything was seen. Simulated with heads whose log-odds are 0.4,
# 1 and 2.5 times what they should be: with 150 rows and more every value from 0.3 up gives the same
# loss on new rows. With 20 and 50 rows 0.5 has the least loss on the whole; without it a pair of
# rows makes the twentieth worst head of two classes twice as bad as it was.
SPREAD = 0.5
_MAX_NUMBERS = 5_000_000  # of a head's predictions that are looked at: a second or so
_MAX_NUMBERS_OF_MANY = 200_000  # the same where many heads are fitted, one after the other
_MIN_ROWS = 2_000  # rows, however many classes there are


def vote_floor(task_kind: TaskKind, n_outputs: int) -> float:
    """Return the smallest share of votes that counts: of all classes, a tenth at most."""
    return VOTE_FLOOR if task_kind == "multi" else min(VOTE_FLOOR, 0.1 / max(n_outputs, 1))


def fit_temperature(
    task_kind: TaskKind,
    target: Array,
    predicted: Array,
    sample_weight: Array | None = None,
    floor: float = FLOOR,
) -> float:
    """The temperature that makes out-of-fold predictions (N, C) most likely; 1 for regression.

    target: as in `Task`. sample_weight: (N,) >= 0, by default all alike. floor: the smallest
    probability that counts, `vote_floor` where heads count votes. Between LOWEST and HIGHEST,
    shrunk towards 1.
    """
    if task_kind == "regression" or len(predicted) == 0:
        return 1.0
    return _fitted(task_kind, target, predicted, sample_weight, floor, _MAX_NUMBERS)


def fit_temperatures(
    task_kind: TaskKind,
    target: Array,
    predicted: Array,
    sample_weight: Array | None = None,
    floors: Sequence[float] | None = None,
) -> Floats:
    """(K,) `fit_temperature` of each of the predictions (K, N, C), on fewer rows where there are
    many; ones for regression.
    """
    if task_kind == "regression" or predicted.shape[1] == 0:
        return np.ones(len(predicted))
    floors = floors or [FLOOR] * len(predicted)
    predictions_and_floors = zip(predicted, floors, strict=True)
    return np.array(
        [
            _fitted(
                task_kind, target, head_predictions, sample_weight, head_floor, _MAX_NUMBERS_OF_MANY
            )
            for head_predictions, head_floor in predictions_and_floors
        ]
    )


def with_temperature(
    task_kind: TaskKind, predicted: Array, temperature: float, floor: float = FLOOR
) -> Floats:
    """(N, C) probabilities, log-odds divided by the temperature; regression as it is."""
    raw_values = np.asarray(predicted, np.float64)
    if task_kind == "regression" or temperature == 1:
        return raw_values
    if task_kind == "multi":
        clipped_values = np.clip(raw_values, floor, 1 - floor)
        with np.errstate(over="ignore"):
            return np.asarray(
                1 / (1 + ((1 - clipped_values) / clipped_values) ** (1 / temperature))
            )
    clipped_values = np.clip(raw_values, floor, None)
    # the largest is 1, and not all can vanish
    powers = (clipped_values / clipped_values.max(1, keepdims=True)) ** (1 / temperature)
    return np.asarray(powers / powers.sum(1, keepdims=True))


def cross_fitted(
    task_kind: TaskKind,
    target: Array,
    predicted: Array,
    part_of_row: Array,
    sample_weight: Array | None = None,
    floor: float = FLOOR,
) -> Floats:
    """(N, C) predictions, each part of the rows at the temperature that the other parts give: what
    a score may be computed of.

    part_of_row: (N,) integers, such as the folds. A temperature that has seen the rows that score
    it flatters itself a little.
    """
    calibrated = np.asarray(predicted, np.float64).copy()
    for part_number in np.unique(part_of_row):
        in_part, in_others = part_of_row == part_number, part_of_row != part_number
        other_weights = None if sample_weight is None else np.asarray(sample_weight)[in_others]
        temperature = fit_temperature(
            task_kind, np.asarray(target)[in_others], predicted[in_others], other_weights, floor
        )
        calibrated[in_part] = with_temperature(task_kind, predicted[in_part], temperature, floor)
    return calibrated


def keep_decisions(
    task_kind: TaskKind, predicted_before: Array, predicted_after: Array
) -> npt.NDArray[np.float32]:
    """Probabilities `predicted_after` (n, C) as float32 that decide as `predicted_before` does,
    where rounding alone has made two classes equal or has put a label to one half. A temperature is
    monotone, float32 is not.
    """
    corrected = np.asarray(predicted_after, np.float32)
    if task_kind == "single":
        row_index, first_class = np.arange(len(corrected)), np.asarray(predicted_before).argmax(1)
        is_lost = corrected.argmax(1) != first_class
        if is_lost.any():
            corrected = corrected.copy()
            corrected[row_index[is_lost], first_class[is_lost]] = np.nextafter(
                corrected[is_lost].max(1), np.float32(2)
            )
    elif task_kind == "multi":
        one_half = np.float32(0.5)
        below_half = np.nextafter(one_half, np.float32(0))
        corrected = np.where(
            np.asarray(predicted_before) >= one_half,
            np.maximum(corrected, one_half),
            np.minimum(corrected, below_half),
        )
    return corrected


def _fitted(
    task_kind: TaskKind,
    target: Array,
    predicted: Array,
    sample_weight: Array | None,
    floor: float,
    max_numbers: int,
) -> float:
    n_rows, n_outputs = predicted.shape
    row_step = max(1, min(n_rows * n_outputs // max_numbers, n_rows // _MIN_ROWS))
    log_odds, true_column = _log_odds(
        task_kind, np.asarray(target)[::row_step], predicted[::row_step], floor
    )
    row_share = (
        np.ones(len(true_column))
        if sample_weight is None
        else np.repeat(
            np.asarray(sample_weight, np.float64)[::row_step],
            len(true_column) // len(predicted[::row_step]),
        )
    )
    return float(np.exp(-_log_sharpness(log_odds, true_column, row_share)))


def _log_odds(
    task_kind: TaskKind, target: Array, predicted: Array, floor: float
) -> tuple[Array, Array]:
    """Logits (n, C) and the true column (n,) of one head's predictions (N, C); of several labels
    each is a row of two.
    """
    clipped_values = np.clip(np.asarray(predicted, np.float64), floor, 1)
    if task_kind == "single":
        return np.log(clipped_values), np.asarray(target, np.int64)
    clipped_values = np.minimum(clipped_values, 1 - floor).ravel()
    true_label = (np.asarray(target, np.float64).reshape(len(predicted), -1) >= 0.5).ravel()
    return np.stack(
        [np.zeros_like(clipped_values), np.log(clipped_values / (1 - clipped_values))], axis=1
    ), true_label.astype(np.int64)


def _log_sharpness(
    logits: Array, true_column: Array, sample_weight: Floats, prior_spread: float = SPREAD
) -> float:
    """log(1 / T): where the slope of the weighted log loss, and of the prior, is zero. logits (n,
    C), truth and weight (n,).

    The slope changes its sign between 0 and the best value of the loss alone, and is followed by
    Newton's method within what is left between two signs: it cannot run away.
    """
    total_weight = sample_weight.sum()
    if not total_weight > 0:
        return 0.0
    sample_weight = sample_weight / total_weight * len(true_column)
    logits = logits - logits.max(1, keepdims=True)
    mean_true_logit = float(sample_weight @ logits[np.arange(len(true_column)), true_column])
    if not np.isfinite(mean_true_logit):  # a row that nothing is predicted for has no slope
        return 0.0
    lower, upper = -np.log(HIGHEST), -np.log(LOWEST)
    log_sharpness = 0.0
    for _ in range(60):
        sharpness = np.exp(log_sharpness)
        probabilities = np.exp(sharpness * logits)
        probabilities /= probabilities.sum(1, keepdims=True)
        mean_logit = (probabilities * logits).sum(1)
        slope_excess = float(sample_weight @ mean_logit) - mean_true_logit  # the slope by 1 / T
        slope = sharpness * slope_excess + log_sharpness / prior_spread**2
        if slope == 0:
            break
        lower, upper = (lower, log_sharpness) if slope > 0 else (log_sharpness, upper)
        logit_variance = float(sample_weight @ ((probabilities * logits**2).sum(1) - mean_logit**2))
        curvature = sharpness * slope_excess + sharpness**2 * logit_variance + 1 / prior_spread**2
        next_value = log_sharpness - slope / curvature if curvature > 0 else (lower + upper) / 2
        if not lower < next_value < upper:
            next_value = (lower + upper) / 2
        if abs(next_value - log_sharpness) < 1e-7:
            return float(next_value)
        log_sharpness = next_value
    return float(log_sharpness)
