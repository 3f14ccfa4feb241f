"""Two models on the same images: paired differences with intervals.

n images, C outputs.
"""

import numpy as np
import pandas as pd

from headrace.heads.arrays import Array, Doubles, Index
from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.intervals import LEVEL
from headrace.heads.evaluate.metrics import SORTED_METRICS, all_metrics, weighted_scores

RESAMPLES = 1000  # of the groups, for an interval
_BLOCK = 50  # resamples in memory at a time
_SORTED_BUDGET = 2e8  # values to sort, of all resamples, for one of SORTED_METRICS


def paired_metrics(
    task_kind: TaskKind, target: Array, predictions: Array, groups: Index, seed: int = 0
) -> pd.DataFrame:
    """Return every metric of two models' predictions (2, n, C) of the same rows: columns metric,
    first, second, difference (second less first), low, high (its 95 % interval).

    The interval of the accuracy is `paired_proportion_interval`, of other metrics the percentiles
    of a bootstrap over groups (n,), whose rows are not independent of each other.
    """
    scores = [all_metrics(task_kind, target, predicted) for predicted in predictions]
    rng = np.random.default_rng(seed)
    group_of_row = np.unique(groups, return_inverse=True)[1]
    n_groups = int(group_of_row.max()) + 1
    rows = []
    for metric in scores[0]:
        first, second = scores[0][metric], scores[1][metric]
        if metric == "accuracy" and task_kind == "single":
            hits = predictions.argmax(2) == target
            low, high = paired_proportion_interval(hits[0], hits[1], groups)
        else:
            resamples = RESAMPLES
            if metric in SORTED_METRICS:
                # Each resample sorts all predictions anew; a hundred still give the ends of a 95 %
                # interval.
                resamples = int(min(RESAMPLES, max(100, _SORTED_BUDGET / predictions.size)))
            gains = []
            for start in range(0, resamples, _BLOCK):
                # How often each group is drawn is a weight of its rows, so that nothing is copied.
                drawn = rng.multinomial(
                    n_groups, np.full(n_groups, 1 / n_groups), min(_BLOCK, resamples - start)
                )
                resampled = weighted_scores(
                    task_kind,
                    target,
                    predictions,
                    np.zeros(len(target), np.int64),
                    metric,
                    drawn.T[group_of_row].astype(np.float64),
                )
                gains.append(resampled[1] - resampled[0])
            low, high = np.nanquantile(
                np.concatenate(gains), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
            ).tolist()
        rows.append((metric, first, second, second - first, low, high))
    return pd.DataFrame(rows, columns=["metric", "first", "second", "difference", "low", "high"])


def paired_proportion_interval(
    first: Array, second: Array, groups: Array | None = None, level: float = LEVEL
) -> tuple[float, float]:
    """Return the interval of the mean of `second` less that of `first`, (n,) of 0 and 1.

    Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions
    based on paired data", Statistics in Medicine 17:2635-2650, method 10. Where rows come in
    groups, the counts are divided by the design effect of the difference.
    """
    from scipy.special import ndtri  # quantile of the normal distribution

    hits = np.stack([np.asarray(first, np.float64), np.asarray(second, np.float64)])
    n_rows = hits.shape[1]
    row_groups = np.arange(n_rows) if groups is None else groups
    design_effect = _design_effect(hits[1] - hits[0], row_groups)
    both, only_first, only_second, neither = (
        float(count) / design_effect
        for count in (
            (hits[0] * hits[1]).sum(),
            (hits[0] * (1 - hits[1])).sum(),
            ((1 - hits[0]) * hits[1]).sum(),
            ((1 - hits[0]) * (1 - hits[1])).sum(),
        )
    )
    n_effective = n_rows / design_effect
    z = float(ndtri((1 + level) / 2))
    share_1, share_2 = (both + only_first) / n_effective, (both + only_second) / n_effective
    low_1, high_1 = _wilson(share_1, n_effective, z)
    low_2, high_2 = _wilson(share_2, n_effective, z)
    product_of_margins = (
        (both + only_first)
        * (only_second + neither)
        * (both + only_second)
        * (only_first + neither)
    )
    numerator = both * neither - only_first * only_second
    if numerator > 0:
        # The continuity correction of method 10.
        numerator = max(numerator - n_effective / 2, 0.0)
    phi = numerator / np.sqrt(product_of_margins) if product_of_margins > 0 else 0.0

    def half_width(of_second: float, of_first: float) -> float:
        variance = of_second**2 - 2 * phi * of_second * of_first + of_first**2
        return float(np.sqrt(max(0.0, variance)))

    difference = share_2 - share_1
    return (
        difference - half_width(share_2 - low_2, high_1 - share_1),
        difference + half_width(high_2 - share_2, share_1 - low_1),
    )


def _wilson(share: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's interval (1927) of a proportion of `n` rows."""
    middle = share + z * z / (2 * n)
    half = z * float(np.sqrt(max(0.0, share * (1 - share)) / n + z * z / (4 * n * n)))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def _design_effect(differences: Doubles, groups: Array) -> float:
    """Return the design effect (Kish 1965): the variance of a mean of rows in groups over that of
    independent rows.

    It is 1 for groups of one row. At most it is that of groups whose rows are all equal, which is
    also taken where no row differs and it cannot be estimated.
    """
    group_of_row = np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(group_of_row).astype(np.float64)
    # If all rows of a group are equal, a group counts as one row.
    worst = float((sizes**2).sum() / sizes.sum())
    if worst <= 1:
        return 1.0
    deviations = differences - differences.mean()
    independent = float((deviations**2).sum())
    if len(sizes) < 2 or independent == 0:
        return worst
    grouped = float((np.bincount(group_of_row, deviations) ** 2).sum())
    return float(np.clip(len(sizes) / (len(sizes) - 1) * grouped / independent, 1.0, worst))
