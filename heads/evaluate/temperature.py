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
are taken for about one vote in a hundred (`floor_of`), others for `FLOOR`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.data.task import TaskKind
from headrace.heads.spec import HeadSpec, KNNSpec, SklearnSpec, spec_from_json

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

# smaller probabilities are taken for it, by the fit and wherever a temperature is applied
FLOOR = 1e-12
# The same of votes. On digits, wine and breast_cancer, 60 to 900 images, 1, 5 and 15 neighbours and
# forests of 50 trees, 0.01 has the least log loss of all from 1e-12 to 0.01, and nearly always the
# least calibration error; that of five neighbours on 150 digits is 5.6 points with it, 6.4 as they
# are, 14.5 with 1e-12.
VOTE_FLOOR = 0.01
_VOTERS = frozenset(
    f"sklearn.{name}Classifier"
    for name in (
        "ensemble.RandomForest",
        "ensemble.ExtraTrees",
        "ensemble.Bagging",
        "tree.DecisionTree",
        "tree.ExtraTree",
        "neighbors.KNeighbors",
        "neighbors.RadiusNeighbors",
    )
)
FARTHEST = -math.log(FLOOR)  # and log-odds, and what a class lies behind the first one, for this
LOWEST, HIGHEST = 0.02, 50.0  # a ridge head of a thousand classes needs 0.05
# Standard deviation of log T before anything was seen. Simulated with heads whose log-odds are 0.4,
# 1 and 2.5 times what they should be: with 150 rows and more every value from 0.3 up gives the same
# loss on new rows. With 20 and 50 rows 0.5 has the least loss on the whole; without it a pair of
# rows makes the twentieth worst head of two classes twice as bad as it was.
SPREAD = 0.5
_NUMBERS = 5_000_000  # of a head's predictions that are looked at: a second or so
_NUMBERS_OF_MANY = 200_000  # the same where many heads are fitted, one after the other
_FEWEST = 2_000  # rows, however many classes there are


def floor_of(spec: HeadSpec | str, kind: TaskKind, classes: int) -> float:
    """The smallest probability that counts of a head of this spec (or its JSON): of all classes, a
    tenth at most.
    """
    head = spec_from_json(spec) if isinstance(spec, str) else spec
    votes = isinstance(head, KNNSpec) or (
        isinstance(head, SklearnSpec) and head.estimator in _VOTERS
    )
    return (
        (VOTE_FLOOR if kind == "multi" else min(VOTE_FLOOR, 0.1 / max(classes, 1)))
        if votes
        else FLOOR
    )


def fit_temperature(
    kind: TaskKind,
    target: Array,
    predicted: Array,
    weight: Array | None = None,
    floor: float = FLOOR,
) -> float:
    """The temperature that makes out-of-fold predictions (N, C) most likely; 1 for regression and
    for no rows.

    target: as in `Task`. weight: (N,) of the rows, >= 0, by default all alike. floor: `floor_of`
    the head. Between LOWEST and HIGHEST, shrunk towards 1.
    """
    if kind == "regression" or len(predicted) == 0:
        return 1.0
    return _fitted(kind, target, predicted, weight, floor, _NUMBERS)


def fit_temperatures(
    kind: TaskKind,
    target: Array,
    predicted: Array,
    weight: Array | None = None,
    floors: Sequence[float] | None = None,
) -> Floats:
    """(K,) `fit_temperature` of each of the predictions (K, N, C), on fewer rows where there are
    many; ones for regression.
    """
    if kind == "regression" or predicted.shape[1] == 0:
        return np.ones(len(predicted))
    floors = floors or [FLOOR] * len(predicted)
    given = zip(predicted, floors, strict=True)
    return np.array(
        [_fitted(kind, target, own, weight, floor, _NUMBERS_OF_MANY) for own, floor in given]
    )


def with_temperature(
    kind: TaskKind, predicted: Array, temperature: float, floor: float = FLOOR
) -> Floats:
    """(N, C) probabilities with their log-odds divided by the temperature; values of a regression
    as they are.
    """
    values = np.asarray(predicted, np.float64)
    if kind == "regression" or temperature == 1:
        return values
    if kind == "multi":
        inside = np.clip(values, floor, 1 - floor)
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + ((1 - inside) / inside) ** (1 / temperature)))
    inside = np.clip(values, floor, None)
    powers = (inside / inside.max(1, keepdims=True)) ** (
        1 / temperature
    )  # the largest is 1, and not all can vanish
    return np.asarray(powers / powers.sum(1, keepdims=True))


def cross_fitted(
    kind: TaskKind,
    target: Array,
    predicted: Array,
    part: Array,
    weight: Array | None = None,
    floor: float = FLOOR,
) -> Floats:
    """(N, C) predictions, each part of the rows at the temperature that the other parts give: what
    a score may be computed of.

    part: (N,) integers, such as the folds. A temperature that has seen the rows that score it
    flatters itself a little.
    """
    found = np.asarray(predicted, np.float64).copy()
    for number in np.unique(part):
        own, others = part == number, part != number
        given = None if weight is None else np.asarray(weight)[others]
        temperature = fit_temperature(
            kind, np.asarray(target)[others], predicted[others], given, floor
        )
        found[own] = with_temperature(kind, predicted[own], temperature, floor)
    return found


def keep_decisions(kind: TaskKind, before: Array, after: Array) -> npt.NDArray[np.float32]:
    """Probabilities `after` (n, C) as float32 that decide as `before` does, where rounding alone
    has made two classes equal or has put a label to one half. A temperature is monotone, float32 is
    not.
    """
    found = np.asarray(after, np.float32)
    if kind == "single":
        rows, first = np.arange(len(found)), np.asarray(before).argmax(1)
        lost = found.argmax(1) != first
        if lost.any():
            found = found.copy()
            found[rows[lost], first[lost]] = np.nextafter(found[lost].max(1), np.float32(2))
    elif kind == "multi":
        half = np.float32(0.5)
        below = np.nextafter(half, np.float32(0))
        found = np.where(
            np.asarray(before) >= half, np.maximum(found, half), np.minimum(found, below)
        )
    return found


def _fitted(
    kind: TaskKind,
    target: Array,
    predicted: Array,
    weight: Array | None,
    floor: float,
    numbers: int,
) -> float:
    rows, width = predicted.shape
    step = max(1, min(rows * width // numbers, rows // _FEWEST))
    log_odds, truth = _log_odds(kind, np.asarray(target)[::step], predicted[::step], floor)
    share = (
        np.ones(len(truth))
        if weight is None
        else np.repeat(np.asarray(weight, np.float64)[::step], len(truth) // len(predicted[::step]))
    )
    return float(np.exp(-_log_sharpness(log_odds, truth, share)))


def _log_odds(kind: TaskKind, target: Array, predicted: Array, floor: float) -> tuple[Array, Array]:
    """Logits (n, C) and the true column (n,) of one head's predictions (N, C); of several labels
    each is a row of two.
    """
    values = np.clip(np.asarray(predicted, np.float64), floor, 1)
    if kind == "single":
        return np.log(values), np.asarray(target, np.int64)
    values = np.minimum(values, 1 - floor).ravel()
    truth = (np.asarray(target, np.float64).reshape(len(predicted), -1) >= 0.5).ravel()
    return np.stack([np.zeros_like(values), np.log(values / (1 - values))], axis=1), truth.astype(
        np.int64
    )


def _log_sharpness(logits: Array, truth: Array, weight: Floats, spread: float = SPREAD) -> float:
    """log(1 / T): where the slope of the weighted log loss, and of the prior, is zero. logits (n,
    C), truth and weight (n,).

    The slope changes its sign between 0 and the best value of the loss alone, and is followed by
    Newton's method within what is left between two signs: it cannot run away.
    """
    total = weight.sum()
    if not total > 0:
        return 0.0
    weight = weight / total * len(truth)
    logits = logits - logits.max(1, keepdims=True)
    told = float(weight @ logits[np.arange(len(truth)), truth])
    if not np.isfinite(told):  # a row that nothing is predicted for has no slope
        return 0.0
    low, high = -np.log(HIGHEST), -np.log(LOWEST)
    value = 0.0
    for _ in range(60):
        sharpness = np.exp(value)
        odds = np.exp(sharpness * logits)
        odds /= odds.sum(1, keepdims=True)
        mean = (odds * logits).sum(1)
        excess = float(weight @ mean) - told  # the slope by 1 / T
        slope = sharpness * excess + value / spread**2
        if slope == 0:
            break
        low, high = (low, value) if slope > 0 else (value, high)
        curved = float(weight @ ((odds * logits**2).sum(1) - mean**2))
        curvature = sharpness * excess + sharpness**2 * curved + 1 / spread**2
        new = value - slope / curvature if curvature > 0 else (low + high) / 2
        if not low < new < high:
            new = (low + high) / 2
        if abs(new - value) < 1e-7:
            return float(new)
        value = new
    return float(value)
