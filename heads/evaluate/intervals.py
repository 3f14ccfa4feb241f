"""Confidence intervals of metrics on held-out rows.

They hold where a percentile bootstrap does not: for few rows, few mistakes, and grouped rows.
N rows, L labels, G groups (rows of one patient, copies of one image). Nothing is random.

- A proportion has the exact interval of Clopper and Pearson (1934). Wilson's is narrower by a
  tenth, and covers 89.5 % at 55 images and an accuracy of .99, 92.1 % at 100.
- With groups it is that of Korn and Graubard (1998, "Confidence intervals for proportions with
  small expected number of positive counts estimated from survey data", Survey Methodology
  24:193-201): the exact interval of the effective sample size, N / design effect. The design effect
  is 1 + (m - 1) × correlation, m the size of the group of an average row (Kish 1965). If few groups
  have a mistake, the correlation of mistakes cannot be estimated: it is shrunk towards 1, the worst
  case, with the weight of PRIOR_GROUPS groups. With the t quantiles of Korn and Graubard instead,
  intervals of 15 groups covered 73 % (correlation .3, accuracy .95), because without mistakes they
  assume no correlation.
- Other metrics between 0 and 1 are treated as a proportion of as many rows as give the variance of
  the jackknife over groups, again shrunk towards the worst case.
- Losses have Student's interval of their logarithm, with the jackknife's standard error over groups
  and G - 1 degrees of freedom (Efron and Tibshirani 1993, chapter 11; with few groups: MacKinnon,
  Nielsen and Webb 2023, "Leverage, influence, and the jackknife in clustered regression models").
  The upper end of a log loss includes one more row, with twice the loss of a guess, because few
  rows may not have shown a mistake yet.

benchmarks/honesty.py measures the coverage.
"""

import numpy as np

from headrace.heads.arrays import Array, Doubles, Index
from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.metrics import row_hits, row_losses, score, weighted_scores

LEVEL = 0.95  # confidence of every interval that is printed
# Stored with intervals, to recognize those of an earlier method.
METHOD = "exact-groups-1"
# 3 is the least with which no simulated case (2 to 20 images in a group, correlations 0 to .3, 37
# to 1,000 images, accuracies .6 to .99) covered less than 93 %; with 2 it was 92 %, without
# shrinkage 73 %.
PRIOR_GROUPS = 3
PRIOR_GROUPS_RANKED = 1  # for areas under curves, whose worst variance is far above the usual one
_MAX_BLOCKS = 200  # of groups, at most, that the jackknife leaves out one after the other
_MAX_TABLE_ELEMENTS = 1e7  # of the jackknife's table of weights, rows × blocks


def metric_interval(
    task_kind: TaskKind,
    target: Array,
    probabilities: Array,
    metric: str,
    *,
    groups: Array | None = None,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Return the confidence interval of a metric of one head on rows that it has not seen.

    target, probabilities, metric: as in `score`.
    groups: (N,) any labels; rows of one group are not independent. None: each row is a group.

    (nan, nan) if the metric is undefined. Raises HeadError where `score` does, and ValueError for
    no rows or a level outside (0, 1).
    """
    n_rows = len(probabilities)
    if n_rows == 0 or not 0 < level < 1:
        raise ValueError(
            f"an interval needs rows and a level in (0, 1), found {n_rows} and {level}"
        )
    metric_value = score(task_kind, target, probabilities, metric)
    if not np.isfinite(metric_value):
        return float("nan"), float("nan")
    group_of_row = _group_numbers(groups, n_rows)
    if metric in ("accuracy", "hamming_accuracy"):
        hits = row_hits(task_kind, target, probabilities, metric)
        return proportion_interval(hits, group_of_row, level)
    if metric in ("log_loss", "mae"):
        losses = row_losses(task_kind, target, probabilities, metric)
        n_choices = 2 if task_kind == "multi" else np.shape(probabilities)[1]
        unseen_loss = 2 * float(np.log(n_choices)) if metric == "log_loss" else None
        return mean_loss_interval(losses, group_of_row, unseen_loss, level)
    standard_error, n_blocks = _jackknife(
        task_kind, target, probabilities, metric, group_of_row, metric_value
    )
    if metric in ("rmse", "calibration_error"):
        return _positive_interval(metric_value, standard_error, n_blocks, level)
    if metric == "r2":  # 1 - r2 is positive
        low, high = _positive_interval(1 - metric_value, standard_error, n_blocks, level)
        return 1 - high, 1 - low
    return _share_interval(
        task_kind, target, probabilities, metric, group_of_row, metric_value, standard_error, level
    )


def proportion_interval(
    hits: Array, groups: Array | None = None, level: float = LEVEL
) -> tuple[float, float]:
    """Return the interval of the mean of hits, 0 or 1, (N,) or (N, L).

    groups: (N,) any labels; None: each row is a group. The L hits of a row are in its group.
    """
    table = np.asarray(hits, np.float64)
    table = table.reshape(len(table), -1)
    group = _group_numbers(groups, len(table))
    sizes = np.bincount(group) * float(table.shape[1])
    group_hits = np.bincount(group, table.sum(1))
    total, value = sizes.sum(), group_hits.sum() / sizes.sum()
    # The design effect if all rows of a group were right or wrong together.
    worst_effect = float((sizes**2).sum() / total)
    correlation = 1.0
    if 0 < value < 1 and len(sizes) > 1 and worst_effect > 1:
        deviation = group_hits - value * sizes
        variance = len(sizes) / (len(sizes) - 1) * (deviation**2).sum() / total**2
        design_effect = variance / (value * (1 - value) / total)
        estimate = float(np.clip((design_effect - 1) / (worst_effect - 1), 0, 1))
        n_with_mistakes, n_with_hits = (group_hits < sizes).sum(), (group_hits > 0).sum()
        weight = _weight_of_estimate(n_with_mistakes, n_with_hits, PRIOR_GROUPS)
        correlation = weight * estimate + (1 - weight)
    return exact_interval(value, total / (1 + (worst_effect - 1) * correlation), level)


def _group_numbers(groups: Array | None, n_rows: int) -> Index:
    """Return the group 0..G-1 of each row, (N,); without groups each row is one."""
    if groups is None:
        return np.arange(n_rows)
    return np.asarray(np.unique(np.asarray(groups), return_inverse=True)[1], np.int64)


def exact_interval(
    proportion: float, n_effective: float, level: float = LEVEL
) -> tuple[float, float]:
    """Return Clopper and Pearson's interval of a proportion of `n_effective` independent rows.

    n_effective need not be a whole number.
    """
    # Quantiles of the beta distribution; scipy.stats takes a second to import.
    from scipy.special import betaincinv

    n_hits, n_misses = proportion * n_effective, (1 - proportion) * n_effective
    tail_probability = (1 - level) / 2
    # Without hits, or misses, the beta distribution is not defined, and the bound is the end of the
    # range. Weighted counts of zero come with rounding errors.
    lower, upper = 0.0, 1.0
    if n_hits > 1e-9:
        lower = float(betaincinv(n_hits, n_misses + 1, tail_probability))
    if n_misses > 1e-9:
        upper = float(betaincinv(n_hits + 1, n_misses, 1 - tail_probability))
    return lower, upper


def _weight_of_estimate(n_with_mistakes: int, n_with_hits: int, prior: int) -> float:
    """Return the weight, 0 to 1, of the estimated variance against the worst case.

    It grows with the number of groups that have the rarer outcome, mistakes or hits.
    """
    n_rarer = min(n_with_mistakes, n_with_hits)
    return n_rarer / (n_rarer + prior)


def _jackknife(
    task_kind: TaskKind,
    target: Array,
    probabilities: Array,
    metric: str,
    group_of_row: Index,
    metric_value: float,
) -> tuple[float, int]:
    """Return a metric's standard error from leaving out blocks of groups, and how many blocks."""
    n_groups = int(group_of_row.max()) + 1
    n_blocks = int(min(n_groups, _MAX_BLOCKS, max(20, _MAX_TABLE_ELEMENTS / len(group_of_row))))
    if n_blocks < 2:
        return float("nan"), 1
    block_of_row = group_of_row
    if n_groups > n_blocks:
        block_of_row = (np.random.default_rng(0).permutation(n_groups) % n_blocks)[group_of_row]
    weights = (block_of_row[:, None] != np.arange(n_blocks)).astype(np.float64)
    predicted = np.asarray(probabilities, np.float64).reshape(1, len(group_of_row), -1)
    one_fold = np.zeros(len(group_of_row), np.int64)
    values = weighted_scores(task_kind, target, predicted, one_fold, metric, weights)[0]
    values = values[np.isfinite(values)]
    n_values = len(values)
    if n_values < 2:
        return float("nan"), 1
    # Deviations from the metric's value, not from their mean, which would give a smaller error.
    squares = ((values - metric_value) ** 2).sum()
    return float(np.sqrt((n_values - 1) / n_values * squares)), n_values


def _positive_interval(
    metric_value: float, standard_error: float, n_blocks: int, level: float
) -> tuple[float, float]:
    from scipy.special import stdtrit  # quantiles of Student's t

    if metric_value <= 0 or not np.isfinite(standard_error):
        return (metric_value, metric_value) if metric_value <= 0 else (0.0, float("inf"))
    quantile = float(stdtrit(max(n_blocks - 1, 1), (1 + level) / 2))
    half_width = quantile * standard_error / metric_value
    # exp(710) is infinite in float64.
    factor = float(np.exp(min(half_width, 700.0)))
    return metric_value * float(np.exp(-half_width)), metric_value * factor


def mean_loss_interval(
    loss_of_row: Doubles, groups: Array, unseen_loss: float | None = None, level: float = LEVEL
) -> tuple[float, float]:
    """Return the interval of the mean of losses (N,) >= 0, in groups (N,) of any labels.

    unseen_loss: loss of one more group, which the upper end includes.
    """
    group_of_row = np.unique(groups, return_inverse=True)[1]

    def interval(losses: Doubles, group: Index) -> tuple[float, float]:
        mean, n_groups = float(losses.mean()), int(group.max()) + 1
        if n_groups < 2:
            return _positive_interval(mean, float("nan"), 1, level)
        squares = (np.bincount(group, losses - losses.mean()) ** 2).sum()
        standard_error = float(np.sqrt(n_groups / (n_groups - 1) * squares)) / len(losses)
        return _positive_interval(mean, standard_error, n_groups, level)

    lower, upper = interval(loss_of_row, group_of_row)
    if unseen_loss is not None:
        with_unseen = np.append(loss_of_row, unseen_loss)
        upper = max(
            upper, interval(with_unseen, np.append(group_of_row, group_of_row.max() + 1))[1]
        )
    return lower, upper


def _share_interval(
    task_kind: TaskKind,
    target: Array,
    probabilities: Array,
    metric: str,
    group_of_row: Index,
    metric_value: float,
    standard_error: float,
    level: float,
) -> tuple[float, float]:
    """Return the interval of a metric in [0, 1] that is no proportion of rows: balanced accuracy,
    macro F1, areas under curves.
    """
    n_rows = len(group_of_row)
    if task_kind == "single":
        classes = np.arange(np.shape(probabilities)[1])
        class_table = np.asarray(target).astype(np.int64)[:, None] == classes
    else:
        class_table = np.asarray(target, np.float64).reshape(n_rows, -1) >= 0.5
    positives = class_table.sum(0)
    smaller_side = np.minimum(positives, n_rows - positives)
    is_ranked = metric in ("auc", "average_precision")
    if is_ranked or task_kind == "multi":
        # The largest variance of an area under a ROC curve is value × (1 - value) / n, n the
        # smaller of the counts of positives and negatives (Birnbaum and Klose 1957).
        column_variances = 1 / smaller_side[smaller_side > 0]
        largest_variance = float(column_variances.mean()) if len(column_variances) else 1.0
    else:  # the mean over classes of proportions of their rows
        present = positives[positives > 0]
        largest_variance = float((1 / present).sum()) / len(present) ** 2
    group_sizes = np.bincount(group_of_row)
    largest_variance = max(largest_variance, 1 / n_rows) * float((group_sizes**2).sum() / n_rows)
    value_spread = metric_value * (1 - metric_value)
    # Variances are in units of value × (1 - value): the variance of one row of a proportion.
    estimated_variance = largest_variance
    if value_spread > 1e-12 and np.isfinite(standard_error):
        estimated_variance = max(standard_error**2 / value_spread, 1 / n_rows)
    is_right = row_hits(task_kind, target, probabilities, "accuracy").reshape(n_rows) > 0.5
    n_with_mistakes, n_with_hits = (
        len(np.unique(group_of_row[rows])) for rows in (~is_right, is_right)
    )
    prior = PRIOR_GROUPS_RANKED if is_ranked else PRIOR_GROUPS
    weight = _weight_of_estimate(n_with_mistakes, n_with_hits, prior)
    worst_variance = max(largest_variance, estimated_variance)
    variance = weight * estimated_variance + (1 - weight) * worst_variance
    return exact_interval(metric_value, max(1 / variance, 1.0), level)
