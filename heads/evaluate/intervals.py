"""Confidence intervals of a head's metrics on held-out rows that hold where a percentile bootstrap
does not: few rows, few mistakes, rows that come in groups.

N rows, G groups (rows of one patient, copies of one image), C classes. Nothing is drawn at random.

- A proportion has the exact interval of Clopper and Pearson (1934). Wilson's is narrower by a
  tenth, and covers 89.5 % at 55 images and an accuracy of .99, 92.1 % at 100.
- With groups it is that of Korn and Graubard (1998, "Confidence intervals for proportions with
  small expected number of positive counts estimated from survey data", Survey Methodology
  24:193-201): the same of the effective sample size, N / design effect. The design effect is 1 + (m
  - 1) × correlation, m the size of the group that an average row is in (Kish 1965). Where few
  groups hold a mistake, the correlation of mistakes cannot be seen: it is drawn together with one,
  the worst, as if PRIOR_GROUPS groups had said so. With the groups' t quantiles instead, as Korn
  and Graubard have it, intervals of 15 groups covered 73 % (correlation .3, accuracy .95), for
  without mistakes they know of no correlation.
- Other metrics between 0 and 1 are taken for a proportion of as many rows as would vary as they do
  by the jackknife over groups, again drawn towards the least that it can be.
- Losses have Student's interval of their logarithm, with the jackknife's standard error over groups
  and G - 1 degrees of freedom (Efron and Tibshirani 1993, chapter 11; with few groups: MacKinnon,
  Nielsen and Webb 2023, "Leverage, influence, and the jackknife in clustered regression models"). A
  log loss that has met no mistake yet is given one row more, of twice the loss of a guess.

benchmarks/honesty.py measures the coverage.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.metrics import row_hits, row_losses, score
from headrace.heads.evaluate.weighted import weighted_scores

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
# stands beside stored intervals, so that those of an earlier method are told
METHOD = "exact-groups-1"
# 3: the least with which no simulated case (2 to 20 images in a group, correlations 0 to .3, 37 to
# 1,000 images, accuracies .6 to .99) covered less than 93 %; 2 left .92, no drawing .73.
PRIOR_GROUPS = 3
PRIOR_GROUPS_RANKED = 1  # of areas under curves, whose worst variance is far above the usual one
# that the jackknife leaves out one by one: groups, dealt to so many where there are more
_BLOCKS = 200
_ELEMENTS = 1e7  # of its table of weights


def metric_interval(
    task_kind: TaskKind,
    target: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    metric: str,
    *,
    groups: npt.NDArray[Any] | None = None,
    level: float = LEVEL,
) -> tuple[float, float]:
    """The confidence interval of a metric of one head on rows that it did not see.

    target, probabilities, metric: as in `score`. groups: (N,) any labels; rows of one group are not
    independent of each other. By default each row is its own. Deterministic. nan where the metric
    is undefined. Raises UnknownMetric; ValueError for no rows or a level outside (0, 1).
    """
    rows = len(probabilities)
    if rows == 0 or not 0 < level < 1:
        raise ValueError(f"an interval needs rows and a level in (0, 1), found {rows} and {level}")
    value = score(task_kind, target, probabilities, metric)
    group = (
        np.arange(rows) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    )
    if not np.isfinite(value):
        return float("nan"), float("nan")
    if metric in ("accuracy", "hamming_accuracy"):
        return proportion_interval(row_hits(task_kind, target, probabilities, metric), group, level)
    if metric in ("log_loss", "mae"):
        losses = row_losses(task_kind, target, probabilities, metric)
        guess = 2 * float(np.log(2 if task_kind == "multi" else np.shape(probabilities)[1]))
        return mean_loss_interval(losses, group, guess if metric == "log_loss" else None, level)
    error, count = _jackknife(task_kind, target, probabilities, metric, group, value)
    if metric in ("rmse", "calibration_error"):
        return _positive_interval(value, error, count, level)
    if metric == "r2":  # what is missing to 1 is positive
        low, high = _positive_interval(1 - value, error, count, level)
        return 1 - high, 1 - low
    return _share_interval(task_kind, target, probabilities, metric, group, value, error, level)


def proportion_interval(
    hits: npt.NDArray[Any], groups: npt.NDArray[Any] | None = None, level: float = LEVEL
) -> tuple[float, float]:
    """The interval of a proportion, of hits (N,) or (N, L) of 0 and 1, the L of a row belonging to
    its group.

    groups: (N,) any labels, by default each row its own.
    """
    table = np.asarray(hits, np.float64)
    rows = len(table)
    table = table.reshape(rows, -1)
    group = (
        np.arange(rows) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    )
    sizes = np.bincount(group) * float(table.shape[1])
    right = np.bincount(group, table.sum(1))
    total, value = sizes.sum(), right.sum() / sizes.sum()
    worst = float(
        (sizes**2).sum() / total
    )  # the design effect where all of a group are right or wrong together
    correlation = 1.0
    if 0 < value < 1 and len(sizes) > 1 and worst > 1:
        deviation = right - value * sizes
        variance = len(sizes) / (len(sizes) - 1) * (deviation**2).sum() / total**2
        seen = float(np.clip((variance / (value * (1 - value) / total) - 1) / (worst - 1), 0, 1))
        known = _known(right < sizes, right > 0, PRIOR_GROUPS)
        correlation = known * seen + (1 - known)
    return exact_interval(value, total / (1 + (worst - 1) * correlation), level)


def exact_interval(value: float, count: float, level: float = LEVEL) -> tuple[float, float]:
    """Clopper and Pearson's interval of a proportion `value` of `count` independent rows, which
    need not be a whole number.
    """
    from scipy.special import (
        betaincinv,
    )  # quantiles of the beta distribution; scipy.stats takes a second to import

    hits, misses = value * count, (1 - value) * count
    tail = (1 - level) / 2
    low = float(betaincinv(hits, misses + 1, tail)) if hits > 1e-9 else 0.0
    high = float(betaincinv(hits + 1, misses, 1 - tail)) if misses > 1e-9 else 1.0
    return low, high


def _known(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_], prior: int) -> float:
    """How far the groups' own variance is believed: by the number of groups that hold what is
    rarer.
    """
    rarer = min(int(first.sum()), int(second.sum()))
    return rarer / (rarer + prior)


def _jackknife(
    task_kind: TaskKind,
    target: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    metric: str,
    group: npt.NDArray[np.int64],
    value: float,
) -> tuple[float, int]:
    """The standard error of a metric by leaving out block after block of groups, and the number of
    blocks.
    """
    count = int(group.max()) + 1
    blocks = int(min(count, _BLOCKS, max(20, _ELEMENTS / len(group))))
    if blocks < 2:
        return float("nan"), 1
    block = (
        (np.random.default_rng(0).permutation(count) % blocks)[group] if count > blocks else group
    )
    weights = (block[:, None] != np.arange(blocks)).astype(np.float64)
    predicted = np.asarray(probabilities, np.float64).reshape(1, len(group), -1)
    one_fold = np.zeros(len(group), np.int64)
    left = weighted_scores(task_kind, target, predicted, one_fold, metric, weights)[0]
    left = left[np.isfinite(left)]
    if len(left) < 2:
        return float("nan"), 1
    # About the value itself, not about their mean: never smaller.
    return float(np.sqrt((len(left) - 1) / len(left) * ((left - value) ** 2).sum())), len(left)


def _positive_interval(value: float, error: float, count: int, level: float) -> tuple[float, float]:
    from scipy.special import stdtrit  # quantiles of Student's t

    if value <= 0 or not np.isfinite(error):
        return (value, value) if value <= 0 else (0.0, float("inf"))
    half = float(stdtrit(max(count - 1, 1), (1 + level) / 2)) * error / value
    return value * float(np.exp(-half)), value * float(np.exp(min(half, 700.0)))


def mean_loss_interval(
    losses: Floats, groups: npt.NDArray[Any], unseen: float | None = None, level: float = LEVEL
) -> tuple[float, float]:
    """The interval of the mean of losses (N,) >= 0, in groups (N,) of any labels.

    unseen: the loss of a group that has not been met yet, in the upper end.
    """
    group = np.unique(groups, return_inverse=True)[1]

    def ends(values: Floats, of: npt.NDArray[np.int64]) -> tuple[float, float]:
        count = int(of.max()) + 1
        if count < 2:
            return _positive_interval(float(values.mean()), float("nan"), 1, level)
        sums = np.bincount(of, values - values.mean())
        error = float(np.sqrt(count / (count - 1) * (sums**2).sum())) / len(values)
        return _positive_interval(float(values.mean()), error, count, level)

    low, high = ends(losses, group)
    if unseen is not None:
        high = max(high, ends(np.append(losses, unseen), np.append(group, group.max() + 1))[1])
    return low, high


def _share_interval(
    task_kind: TaskKind,
    target: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    metric: str,
    group: npt.NDArray[np.int64],
    value: float,
    error: float,
    level: float,
) -> tuple[float, float]:
    """Of a metric between 0 and 1 that is no plain proportion: balanced accuracy, macro F1, areas
    under curves.
    """
    rows = len(group)
    if task_kind == "single":
        table = np.asarray(target).astype(np.int64)[:, None] == np.arange(
            np.shape(probabilities)[1]
        )
    else:
        table = np.asarray(target, np.float64).reshape(rows, -1) >= 0.5
    positives = table.sum(0)
    smaller = np.minimum(positives, rows - positives)
    ranked = metric in ("auc", "average_precision")
    if ranked or task_kind == "multi":
        # No area under a ROC curve varies more than this: value × (1 - value) / the smaller side
        # (Birnbaum and Klose 1957).
        each = 1 / smaller[smaller > 0]
        worst = float(each.mean()) if len(each) else 1.0
    else:  # a mean of the shares of the classes
        worst = float((1 / positives[positives > 0]).sum()) / int((positives > 0).sum()) ** 2
    sizes = np.bincount(group)
    worst = max(worst, 1 / rows) * float((sizes**2).sum() / rows)
    spread = value * (1 - value)
    seen = max(error**2 / spread, 1 / rows) if spread > 1e-12 and np.isfinite(error) else worst
    whole = row_hits(task_kind, target, probabilities, "accuracy").reshape(rows) > 0.5
    held = [np.isin(np.arange(len(sizes)), group[which]) for which in (~whole, whole)]
    known = _known(held[0], held[1], PRIOR_GROUPS_RANKED if ranked else PRIOR_GROUPS)
    variance = known * seen + (1 - known) * max(worst, seen)
    return exact_interval(value, max(1 / variance, 1.0), level)
