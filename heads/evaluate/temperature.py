"""The temperature T of a classifier: its log-odds are divided by T to calibrate its probabilities.

N rows, C outputs, K heads. T > 1 if the head was overconfident, T < 1 if it was underconfident
(Guo, Pleiss, Sun and Weinberger 2017, "On calibration of modern neural networks"). It changes no
decision: the largest probability stays the largest, and a label at one half or more stays there.

T is fitted to the log loss of out-of-fold predictions. The expected calibration error would not do:
it has bins and jumps, and is least for predictions that say nothing (the classes' shares for every
row). The loss is convex in 1 / T. A head without mistakes would have T = 0, one that knows nothing
T = ∞, and gradient steps diverge towards both; a few rows decide nothing. So log T has a normal
prior around 0 (`PRIOR_STD`), and the root is found between fixed ends.

For heads with log-odds these are divided (`predict_head`). For heads with only probabilities p
becomes p^(1/T), scaled to sum to one. A class that none of five neighbours has gets exactly 0,
which no power changes, and a single row of that class would make T arbitrarily large: zeros of
votes count as about one vote in a hundred (`vote_floor`), others as `FLOOR`.
"""

import math
from collections.abc import Sequence

import numpy as np

from headrace.heads.arrays import Array, Doubles, Floats
from headrace.heads.data.task import TaskKind

# Smaller probabilities count as this one, in the fit and wherever a temperature is applied.
FLOOR = 1e-12
# The same for votes. On digits, wine and breast_cancer, 60 to 900 images, 1, 5 and 15 neighbours
# and forests of 50 trees, 0.01 has the least log loss of all values from 1e-12 to 0.01, and nearly
# always the least calibration error: of five neighbours on 150 digits 5.6 points, without a
# temperature 6.4, with 1e-12 14.5.
VOTE_FLOOR = 0.01
# The same limit for log-odds, and for the distance of a class's logit from the largest one.
MAX_LOG_ODDS = -math.log(FLOOR)
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.02, 50.0  # a ridge head of a thousand classes needs 0.05
# Standard deviation of the prior of log T. Simulated with heads whose log-odds are 0.4, 1 and 2.5
# times too large: from 150 rows on every value of at least 0.3 gives the same loss on new rows.
# With 20 and 50 rows 0.5 has the least loss overall; without a prior, one head of two classes in
# twenty gets at least twice the loss that it had.
PRIOR_STD = 0.5
_MIN_ROWS = 2_000  # that are used for any number of classes


def vote_floor(task_kind: TaskKind, n_outputs: int) -> float:
    """Return the share of votes as which smaller ones count."""
    # All classes at the floor have at most a tenth of the votes together.
    return VOTE_FLOOR if task_kind == "multi" else min(VOTE_FLOOR, 0.1 / max(n_outputs, 1))


def fit_temperature(
    task_kind: TaskKind,
    target: Array,
    predicted: Array,
    sample_weight: Array | None = None,
    floor: float = FLOOR,
    max_numbers: int = 5_000_000,
) -> float:
    """Return the temperature of the largest posterior for out-of-fold predictions (N, C).

    target: as in `Task`.
    sample_weight: (N,) >= 0; None: all equal.
    floor: smaller probabilities count as this one; `vote_floor` for heads that count votes.
    max_numbers: how many of the N x C predictions are used; the default takes about a second.

    It lies between MIN_TEMPERATURE and MAX_TEMPERATURE, shrunk towards 1; it is 1 for regression.
    """
    if task_kind == "regression" or len(predicted) == 0:
        return 1.0
    n_rows, n_outputs = predicted.shape
    step = max(1, min(n_rows * n_outputs // max_numbers, n_rows // _MIN_ROWS))
    predicted = predicted[::step]
    log_odds, true_column = _log_odds(task_kind, np.asarray(target)[::step], predicted, floor)
    weight = np.ones(len(true_column))
    if sample_weight is not None:
        # Each label of a row has the row's weight.
        labels_of_row = len(true_column) // len(predicted)
        weight = np.repeat(np.asarray(sample_weight, np.float64)[::step], labels_of_row)
    return float(np.exp(-_log_sharpness(log_odds, true_column, weight)))


def fit_temperatures(
    task_kind: TaskKind,
    target: Array,
    predicted: Array,
    sample_weight: Array | None = None,
    floors: Sequence[float] | None = None,
) -> Doubles:
    """Return `fit_temperature` of each head's predictions (K, N, C), (K,), on fewer rows of large
    tasks.
    """
    return np.array(
        [
            fit_temperature(
                task_kind, target, head_predictions, sample_weight, floor, max_numbers=200_000
            )
            for head_predictions, floor in zip(
                predicted, floors or [FLOOR] * len(predicted), strict=True
            )
        ]
    )


def with_temperature(
    task_kind: TaskKind, predicted: Array, temperature: float, floor: float = FLOOR
) -> Doubles:
    """Return the probabilities (N, C) with log-odds divided by the temperature.

    Predictions of a regression stay as they are.
    """
    raw_values = np.asarray(predicted, np.float64)
    if task_kind == "regression" or temperature == 1:
        return raw_values
    if task_kind == "multi":
        clipped_values = np.clip(raw_values, floor, 1 - floor)
        # At a low temperature a power may be infinite; its reciprocal is 0, which is right.
        with np.errstate(over="ignore"):
            odds_against = ((1 - clipped_values) / clipped_values) ** (1 / temperature)
        return np.asarray(1 / (1 + odds_against))
    clipped_values = np.clip(raw_values, floor, None)
    # Relative to the largest, whose power is 1, so that not all of them underflow.
    powers = (clipped_values / clipped_values.max(1, keepdims=True)) ** (1 / temperature)
    return np.asarray(powers / powers.sum(1, keepdims=True))


def cross_fitted(
    task_kind: TaskKind,
    target: Array,
    predicted: Array,
    part_of_row: Array,
    sample_weight: Array | None = None,
    floor: float = FLOOR,
) -> Doubles:
    """Return the predictions (N, C), each part of the rows at the temperature of the other parts.

    Scores are computed from these: a temperature fitted on the same rows is slightly optimistic.

    part_of_row: (N,) integers, such as the folds.
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


def keep_decisions(task_kind: TaskKind, predicted_before: Array, predicted_after: Array) -> Floats:
    """Return `predicted_after` (n, C) as float32 with the decisions of `predicted_before` (n, C).

    A temperature changes no decision, but rounding to float32 may make two classes equal, or put a
    label on one half.
    """
    corrected = np.asarray(predicted_after, np.float32)
    if task_kind == "single":
        decided = np.asarray(predicted_before).argmax(1)
        lost = np.flatnonzero(corrected.argmax(1) != decided)
        if len(lost):
            corrected = corrected.copy()
            corrected[lost, decided[lost]] = np.nextafter(corrected[lost].max(1), np.float32(2))
    elif task_kind == "multi":
        half = np.float32(0.5)
        below_half = np.nextafter(half, np.float32(0))
        is_present = np.asarray(predicted_before) >= half
        corrected = np.where(
            is_present, np.maximum(corrected, half), np.minimum(corrected, below_half)
        )
    return corrected


def _log_odds(
    task_kind: TaskKind, target: Array, predicted: Array, floor: float
) -> tuple[Array, Array]:
    """Return logits (n, C) and true columns (n,) of one head's predictions (N, C).

    For a multi-label task, n = N C: each label is a row of two classes.
    """
    clipped_values = np.clip(np.asarray(predicted, np.float64), floor, 1)
    if task_kind == "single":
        return np.log(clipped_values), np.asarray(target, np.int64)
    clipped_values = np.minimum(clipped_values, 1 - floor).ravel()
    true_label = (np.asarray(target, np.float64).reshape(len(predicted), -1) >= 0.5).ravel()
    log_odds = np.log(clipped_values / (1 - clipped_values))
    return np.stack([np.zeros_like(log_odds), log_odds], axis=1), true_label.astype(np.int64)


def _log_sharpness(logits: Array, true_column: Array, sample_weight: Doubles) -> float:
    """Return log(1 / T) at which the slope of the weighted log loss and the prior is zero.

    logits: (n, C); true_column, sample_weight: (n,). Newton's method within a bracket of two signs
    of the slope, so it cannot diverge.
    """
    total_weight = sample_weight.sum()
    if not total_weight > 0:
        return 0.0
    sample_weight = sample_weight / total_weight * len(true_column)
    logits = logits - logits.max(1, keepdims=True)
    mean_true_logit = float(sample_weight @ logits[np.arange(len(true_column)), true_column])
    if not np.isfinite(mean_true_logit):  # a row without a finite prediction
        return 0.0
    lower, upper = -np.log(MAX_TEMPERATURE), -np.log(MIN_TEMPERATURE)
    log_sharpness = 0.0
    for _ in range(60):  # twice what bisection alone takes
        sharpness = np.exp(log_sharpness)
        probabilities = np.exp(sharpness * logits)
        probabilities /= probabilities.sum(1, keepdims=True)
        mean_logit = (probabilities * logits).sum(1)
        slope_excess = float(sample_weight @ mean_logit) - mean_true_logit  # derivative by 1 / T
        slope = sharpness * slope_excess + log_sharpness / PRIOR_STD**2
        if slope == 0:
            break
        lower, upper = (lower, log_sharpness) if slope > 0 else (log_sharpness, upper)
        logit_variance = float(sample_weight @ ((probabilities * logits**2).sum(1) - mean_logit**2))
        curvature = sharpness * slope_excess + sharpness**2 * logit_variance + 1 / PRIOR_STD**2
        # A Newton step, and bisection where that leaves the bracket.
        next_value = log_sharpness - slope / curvature if curvature > 0 else (lower + upper) / 2
        if not lower < next_value < upper:
            next_value = (lower + upper) / 2
        if abs(next_value - log_sharpness) < 1e-7:
            return float(next_value)
        log_sharpness = next_value
    return float(log_sharpness)
