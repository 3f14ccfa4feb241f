"""Correction for selection: the winner's expected score on new images, and the heads that are
statistically tied with it.

K heads, N held-out rows, B resamples. The best of K validation scores is too good: part of it is
luck. The correction is that of Tsamardinos, Greasidou and Borboudakis (2018), "Bootstrapping the
out-of-sample predictions for efficient and accurate cross-validation" (BBC-CV): the choice is
repeated on some of the rows, and each time the chosen head is scored on the others. No head is
trained again.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from headrace.heads.arrays import Array, Doubles, Floats, Index, Mask
from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.intervals import metric_interval
from headrace.heads.evaluate.metrics import (
    METRICS,
    SORTED_METRICS,
    row_hits,
    score,
    sign,
    weighted_scores,
)
from headrace.heads.evaluate.temperature import FLOOR, fit_temperature, with_temperature
from headrace.heads.predict import probability_floor
from headrace.pipelines.selection.calibration import Calibration, calibrate, calibrated
from headrace.pipelines.selection.predictions import (
    ValidationRows,
    read_predictions,
    stacked_predictions,
)

Blocks = Iterable[tuple[Index, Floats]]

RESAMPLES = 500  # of the validation rows
LEVEL = 0.95  # confidence of intervals, and of the set of tied heads
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)  # the quantiles at the ends of an interval
# BBC-CV draws the rows with replacement. N such rows tell as much as N / 2 distinct ones, so that
# worse heads are chosen than from all rows: by 0.33 points of accuracy at 150 rows, and by only
# 0.09 where a fifth of the rows is left out (the loss grows with rows / effective rows - 1).
# Only for metrics that are means over rows: others are often undefined on a fifth of the rows.
LEFT_OUT_SHARE = 0.2
ROW_MEANS = ("accuracy", "hamming_accuracy", "log_loss", "mae")
_SHARE_BUDGET = 2e8  # N × C × resamples in `share_optimism`, about a second
# K × N × C × B for the metrics that sort rows (AUC, average precision), a second or two: they have
# no matrix product, and so get fewer heads and resamples.
SORTED_BUDGET = 4e8
SORTED_RESAMPLES = 200


@dataclass(frozen=True)
class CorrectedScore:
    """The outcome of selecting the best of `tried` settings, corrected for having selected it."""

    metric: str
    tried: int  # settings that the winner was selected from
    images: int  # held-out rows that they were compared on
    resamples: int
    validation: float  # the winner's own validation score: the best of `tried`, and so too good
    # the same at the winner's temperature, cross-fitted; differs for log loss, not for accuracy
    calibrated: float
    expected: float  # the score to expect of it, at its temperature, on new images
    low: float  # 95 % interval of `expected`
    high: float
    statistically_tied: int  # settings not worse than the best at 95 % confidence, winner included
    cheapest: int  # of the tied settings, the leaderboard's rank of the one with fewest features
    calibration: Calibration | None  # of the winner; None for regression
    table: pd.DataFrame  # one row per compared setting; see `compare_with_best`

    @property
    def optimism(self) -> float:
        """How much too good the validation score is, >= 0 but for resampling noise."""
        return (self.calibrated - self.expected) * sign(self.metric)

    def summary(self) -> dict[str, Any]:
        """Return everything but the table, for JSON; an undefined number is None."""
        values = {name: value for name, value in vars(self).items() if name != "table"}
        values["optimism"] = self.optimism
        values["calibration"] = None if self.calibration is None else self.calibration.summary()
        return {name: None if value != value else value for name, value in values.items()}


@dataclass(frozen=True)
class _ResampledScores:
    """Scores of K heads on the rows as they are and on B resamples of them; higher is better."""

    compared: pd.DataFrame  # (K rows) of the leaderboard, best first
    observed: Doubles  # (K,)
    drawn: Doubles  # (K, B) on rows drawn with replacement
    chosen_on: Doubles  # (K, B) on the rows that a choice is made on
    left_out: Doubles  # (K, B) on the other rows
    left_out_share: float
    hits: Mask | None  # (K, N) right and wrong predictions, for accuracy alone
    winner_predictions: Floats  # (N, C)


def assess_selection(
    board: pd.DataFrame,
    validation: ValidationRows,
    metric: str,
    *,
    blocks: Blocks | None = None,
    halving_luck: tuple[float, Doubles] | None = None,
) -> CorrectedScore | None:
    """Assess the selection among the complete heads of a leaderboard; None below two held-out rows.

    board: best first.
    blocks: (positions in the board, predictions (k, N, C)), by default the stored ones.
    halving_luck: after a successive halving of inputs on the same rows, the luck of its choice and
    the errors (N,) of the winner's input in it. The luck counts by the correlation of these errors
    with the winner's own.
    """
    scores = _score_resamples(board, validation, metric, blocks)
    if scores is None:
        return None
    task_kind, predicted = validation.task.kind, scores.winner_predictions
    cost = scores.compared["features"].to_numpy()
    chosen = chosen_scores(scores.chosen_on, scores.left_out, cost)
    expected, low, high = mean_and_interval(chosen, scores.left_out_share, scores.left_out[0])
    # Held-out rows of stratified folds have the class shares that their heads were trained on; new
    # rows have others.
    optimism, optimism_spread = (
        share_optimism(validation, predicted, metric) if is_stratified(validation) else (0.0, 0.0)
    )
    # The mean over training sets is subtracted below. That of this training set may differ from it.
    low, high = widened(expected, low, high, optimism_spread)
    if halving_luck is not None and metric in ("accuracy", "hamming_accuracy"):
        luck, halving_errors = halving_luck
        winner_errors = 1 - row_hits(task_kind, validation.target, predicted, metric)
        optimism += luck * _error_correlation(halving_errors, winner_errors)
    # Simulated boards have scores alone.
    floor = (
        probability_floor(scores.compared["spec"].iloc[0], task_kind, predicted.shape[1])
        if "spec" in scores.compared
        else FLOOR
    )
    at_temperature = calibrated(validation, predicted, floor)
    # The choice was made without the temperature, which changes the score by the same amount in
    # every resample: the change is added once.
    temperature_gain = _mean_score(validation, at_temperature, metric) - _mean_score(
        validation, predicted, metric
    )
    expected, low, high = (
        sign(metric) * value - optimism + temperature_gain for value in (expected, low, high)
    )
    # With very few rows the optimism can exceed the whole score.
    expected = float(np.clip(expected, *_metric_range(metric)))
    low, high = no_narrower(
        validation, at_temperature, metric, expected, (min(low, high), max(low, high))
    )
    ranks = scores.compared["rank"].to_numpy()
    table = compare_with_best(scores.observed, scores.drawn, scores.hits)
    table.insert(0, "rank", ranks)
    tied = table["statistically_tied"].to_numpy()
    cheapest = np.lexsort((-scores.observed, np.where(tied, cost, np.inf)))[0]
    validation_score = float(scores.compared[metric].iloc[0])
    return CorrectedScore(
        metric=metric,
        tried=len(scores.compared),
        images=len(validation),
        resamples=int(np.isfinite(chosen).sum()),
        validation=validation_score,
        calibrated=validation_score + temperature_gain,
        expected=expected,
        low=low,
        high=high,
        statistically_tied=int(tied.sum()),
        cheapest=int(ranks[cheapest]),
        calibration=calibrate(validation, predicted, floor),
        table=table,
    )


def _score_resamples(
    board: pd.DataFrame, validation: ValidationRows, metric: str, blocks: Blocks | None
) -> _ResampledScores | None:
    """Score the heads of a board; None without a row that can be left out, or without a head that
    has all predictions.
    """
    task_kind, fold, target = validation.task.kind, validation.fold, validation.target
    n_resamples = RESAMPLES
    if metric in SORTED_METRICS:
        n_resamples = SORTED_RESAMPLES
        n_outputs = max(1, len(validation.task.classes))
        # Each resample is scored twice: on its rows, and on those left out.
        max_heads = int(SORTED_BUDGET / (2 * n_resamples * len(validation) * n_outputs))
        board = board.head(max(max_heads, 2))  # a head far down never wins a resample
    drawn = resampled_rows(fold, validation.groups, n_resamples, 0)
    if metric in ROW_MEANS:
        left_out = left_out_rows(fold, validation.groups, n_resamples, 0)
        chosen_on = [1 - left_out]
    else:  # the choice is made on the drawn rows themselves
        left_out, chosen_on = (drawn == 0).astype(np.float64), []
    if not left_out.any():
        return None
    # Weights (N, 1 + B or 1 + 2 B); the first column is for the rows as they are.
    weights = np.concatenate([np.ones((len(drawn), 1)), drawn, *chosen_on], axis=1)
    # The few rows of one fold that were left out may hardly differ, and R² among them is then far
    # below anything real.
    left_out_fold = np.zeros_like(fold) if metric == "r2" else fold
    best_position, winner_predictions = len(board), None
    position_blocks, score_blocks, hit_blocks = [], [], []
    for positions, predicted in read_predictions(board, validation) if blocks is None else blocks:
        position_blocks.append(positions)
        if positions.min() < best_position:
            best_position = positions.min()
            winner_predictions = predicted[int(positions.argmin())]
        score_pair = [
            weighted_scores(task_kind, target, predicted, fold_of_row, metric, row_weights)
            for fold_of_row, row_weights in ((fold, weights), (left_out_fold, left_out))
        ]
        score_blocks.append(np.concatenate(score_pair, axis=1))
        if metric == "accuracy":
            hit_blocks.append(_hits(task_kind, target, predicted))
    if winner_predictions is None:
        return None
    order = np.argsort(np.concatenate(position_blocks))
    # (K, 1 + 2 B or 1 + 3 B): as they are, drawn, chosen on (if not the drawn), left out
    scores = np.concatenate(score_blocks)[order] * sign(metric)
    return _ResampledScores(
        compared=board.iloc[np.concatenate(position_blocks)[order]],
        observed=scores[:, 0],
        drawn=scores[:, 1 : 1 + n_resamples],
        chosen_on=scores[:, -2 * n_resamples : -n_resamples],
        left_out=scores[:, -n_resamples:],
        left_out_share=float(left_out.mean()),
        hits=np.concatenate(hit_blocks)[order] if metric == "accuracy" else None,
        winner_predictions=winner_predictions,
    )


def _mean_score(validation: ValidationRows, predicted: Array, metric: str) -> float:
    """Return the mean over folds of the metric of predictions (N, C), as the leaderboard has it."""
    scores = weighted_scores(
        validation.task.kind,
        validation.target,
        predicted[None],
        validation.fold,
        metric,
        np.ones((len(validation), 1)),
    )
    return float(scores[0, 0])


def resampled_rows(fold: Array, groups: Array, resamples: int, seed: int) -> Doubles:
    """Return how often each row is drawn, (N, B): groups with replacement, in each fold as many as
    it has.
    """
    rng = np.random.default_rng(seed)
    drawn = np.zeros((len(fold), resamples))
    for fold_rows, group_codes, n_groups in _groups_of_folds(fold, groups):
        group_counts = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), resamples).T
        drawn[fold_rows] = group_counts[group_codes]
    return drawn


def left_out_rows(fold: Array, groups: Array, resamples: int, seed: int) -> Doubles:
    """Return which rows are left out, (N, B) 0/1: of each fold a fifth of its groups, one at least
    and never all.
    """
    rng = np.random.default_rng(seed)
    left_out = np.zeros((len(fold), resamples))
    for fold_rows, group_codes, n_groups in _groups_of_folds(fold, groups):
        n_left_out = min(max(1, round(LEFT_OUT_SHARE * n_groups)), n_groups - 1)
        ranks = rng.random((n_groups, resamples)).argsort(0).argsort(0)
        left_out[fold_rows] = (ranks < n_left_out)[group_codes]
    return left_out


def _groups_of_folds(fold: Array, groups: Array) -> Iterator[tuple[Index, Index, int]]:
    """Yield the rows (n,) of each fold, each one's group (n,) counted from 0, and their number."""
    for fold_number in np.unique(fold):
        fold_rows = np.flatnonzero(fold == fold_number)
        group_codes = np.unique(groups[fold_rows], return_inverse=True)[1]
        yield fold_rows, group_codes, int(group_codes.max()) + 1


def chosen_scores(inside: Doubles, outside: Doubles, cost: Array) -> Doubles:
    """Return (B,) the score outside of the resample, of the head that is best inside of it.

    inside, outside: scores (K, B) on some rows and on the others; higher is better, nan where
    undefined. Ties go to the cheaper head.
    """
    best = best_heads(inside, cost)
    return np.asarray(outside[best, np.arange(inside.shape[1])])


def choice_luck(row_scores: Doubles, fold: Array, groups: Array) -> float:
    """Return by how much the best mean of row scores (K, N) is higher than what choosing it yields
    on other rows. Higher scores are better.
    """
    group_codes = np.unique(groups, return_inverse=True)[1]
    drawn = resampled_rows(fold, group_codes, RESAMPLES, 0)
    not_drawn = (drawn == 0).astype(np.float64)
    inside, outside = (
        row_scores @ weights / np.maximum(weights.sum(0), 1) for weights in (drawn, not_drawn)
    )
    equal_costs = np.zeros(len(row_scores))
    return float(row_scores.mean(1).max() - chosen_scores(inside, outside, equal_costs).mean())


def best_heads(scores: Doubles, cost: Array) -> Index:
    """Return (B,) the position of the best head by each column of scores (K, B), higher is better;
    ties go to the cheaper head.
    """
    by_cost = np.argsort(cost, kind="stable")
    # The leaderboard's order would break ties by the very rows that are left out.
    comparable = np.round(np.where(np.isfinite(scores), scores, -np.inf)[by_cost], 6)
    return np.asarray(by_cost[comparable.argmax(0)], np.int64)


def nested_choice(
    board: pd.DataFrame, validation: ValidationRows, metric: str, part_of_row: Index
) -> Doubles:
    """Return (N, C) predictions of each part of the rows by the head that is best on the other
    parts, at the temperature fitted to these.

    Their score is that of choosing the best head, without the luck of the rows that it was chosen
    on.

    part_of_row: (N,). Heads without a prediction for each row cannot be chosen; at least one head
    has them.
    """
    task_kind, n_outputs = validation.task.kind, len(validation.task.classes)
    part_numbers = np.unique(part_of_row)
    other_parts = (part_of_row[:, None] != part_numbers).astype(np.float64)
    candidates = board
    if metric in SORTED_METRICS:
        # Only the first heads of a long board are tried, which leaves some luck in the score.
        n_elements = len(validation) * max(1, n_outputs) * len(part_numbers)
        candidates = board.head(max(int(SORTED_BUDGET / n_elements), 2))
    position_blocks, score_blocks = [], []
    # The whole board counts only where no candidate has predictions for each row.
    for heads in (candidates, board):
        for positions, predicted in read_predictions(heads, validation):
            position_blocks.append(positions)
            score_blocks.append(
                weighted_scores(
                    task_kind, validation.target, predicted, validation.fold, metric, other_parts
                )
            )
        if position_blocks:
            break
    positions = np.concatenate(position_blocks)
    cost = board["features"].to_numpy()[positions]
    best = positions[best_heads(sign(metric) * np.concatenate(score_blocks), cost)]
    chosen, chosen_of_part = np.unique(best, return_inverse=True)
    complete, predictions = stacked_predictions(board.iloc[chosen], validation)
    assert len(complete) == len(chosen)  # they had all their predictions a moment ago
    floors = [
        probability_floor(spec, task_kind, n_outputs) for spec in board["spec"].to_numpy()[chosen]
    ]
    nested = np.zeros(predictions.shape[1:])
    for part_number, head in zip(part_numbers, chosen_of_part, strict=True):
        inside = part_of_row != part_number
        temperature = fit_temperature(
            task_kind,
            validation.target[inside],
            predictions[head][inside],
            validation.weight[inside],
            floors[head],
        )
        nested[~inside] = with_temperature(
            task_kind, predictions[head][~inside], temperature, floors[head]
        )
    return nested


def mean_and_interval(
    out_of_bag: Doubles, left_out_share: float, of_winner: Doubles
) -> tuple[float, float, float]:
    """Return the mean of out-of-bag scores (B,), and the ends of its interval; nan where all are.

    left_out_share: of the rows, in each score. of_winner: (B,) scores of the winner on them.
    """
    is_defined = np.isfinite(out_of_bag)
    scores = out_of_bag[is_defined]
    if len(scores) == 0:
        return float("nan"), float("nan"), float("nan")
    mean = float(scores.mean())
    # A score of some of the rows varies more than one of all: the delete-d jackknife's factor (Shao
    # and Wu 1989).
    odds = left_out_share / (1 - left_out_share) if left_out_share < 1 else 1.0
    shrinkage = min(1.0, float(np.sqrt(odds)))
    below, above = np.quantile(scores, ENDS) - mean
    low, high = mean + shrinkage * min(0.0, below), mean + shrinkage * max(0.0, above)
    # The winner's score less that of the chosen heads is an estimate, with an error of its own.
    choice_error = shrinkage * float(np.nanstd(of_winner[is_defined] - scores))
    return mean, *widened(mean, low, high, choice_error)


def widened(value: float, low: float, high: float, standard_error: float) -> tuple[float, float]:
    """Return the ends of an interval around `value` that counts another, independent error too."""
    margin = NormalDist().inv_cdf(ENDS[1]) * standard_error
    return (
        value - float(np.hypot(value - low, margin)),
        value + float(np.hypot(high - value, margin)),
    )


def _error_correlation(halving_errors: Doubles, winner_errors: Doubles) -> float:
    """Return the correlation of two heads' errors on the same rows, 0 to 1."""
    first = np.nan_to_num(halving_errors)  # nan: a fold that the halving left out
    second = winner_errors.reshape(len(winner_errors), -1).mean(1)
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return max(0.0, float(np.corrcoef(first, second)[0, 1]))


def is_stratified(validation: ValidationRows) -> bool:
    """Return whether each class has equally many rows in all folds, give or take one."""
    # Folds drawn by headrace are stratified; those of a user's column hardly ever.
    folds = np.unique(validation.fold)
    if validation.task.kind != "single" or len(folds) < 2:
        return False
    n_classes = len(validation.task.classes)
    counts = np.array(
        [np.bincount(validation.target[validation.fold == f], minlength=n_classes) for f in folds]
    )
    # Folds of one row each (leave-one-out) differ by one row at most, whatever their classes.
    return bool((np.ptp(counts, axis=0) <= 1).all() and counts.sum() > len(counts))


def share_optimism(
    validation: ValidationRows, predicted: Array, metric: str
) -> tuple[float, float]:
    """Return the score of predictions (N, C) on rows with the class shares that their head was
    trained on, less that on new rows with the population's shares: its mean and its standard
    deviation over training sets, in the metric's own direction.

    A parametric bootstrap: training shares are drawn from the population's (estimated); predictions
    are moved to them by Bayes' rule, and scored on rows weighted to the drawn shares and to the
    population's.
    """
    target = validation.target
    shares = np.bincount(target, minlength=predicted.shape[1]) / len(target)
    present = shares > 0
    # The population's shares are estimated by those of the held-out rows, shrunk towards equal ones
    # by the spread expected from chance alone (James and Stein 1961): with ten equal classes and
    # 150 rows nearly all of the spread is chance.
    equal_shares = present / present.sum()
    chance_spread = (equal_shares * (1 - equal_shares)).sum() / len(target)
    spread = ((shares - equal_shares) ** 2).sum()
    kept_spread = max(0.0, 1 - chance_spread / spread if spread > 0 else 0.0)
    population = equal_shares + kept_spread * (shares - equal_shares)
    rng = np.random.default_rng(0)
    resamples = int(min(200, max(10, _SHARE_BUDGET / predicted.size)))
    if metric in SORTED_METRICS:
        resamples = min(resamples, 20)
    one_fold = np.zeros(len(target), np.int64)
    divisor = np.where(present, shares, 1)
    weight_of_new = (population / divisor)[target]
    gaps = []
    for drawn_shares in rng.multinomial(len(target), population, resamples) / len(target):
        ratio = drawn_shares / divisor
        # By Bayes' rule (Saerens, Latinne and Decaestecker 2002, "Adjusting the outputs of a
        # classifier to new a priori probabilities", Neural Computation 14:21-41).
        reweighted = predicted * ratio
        total = reweighted.sum(1, keepdims=True)
        adjusted = np.where(total > 0, reweighted / np.where(total > 0, total, 1), predicted)
        weights = np.stack([ratio[target], weight_of_new], axis=1)
        as_trained, as_new = weighted_scores(
            "single", target, adjusted[None], one_fold, metric, weights
        )[0]
        gaps.append(as_trained - as_new)
    defined_gaps = [gap for gap in gaps if np.isfinite(gap)]
    if not defined_gaps:
        return 0.0, 0.0
    return float(np.mean(defined_gaps)), float(np.std(defined_gaps))


def no_narrower(
    validation: ValidationRows,
    predicted: Array,
    metric: str,
    value: float,
    ends: tuple[float, float],
) -> tuple[float, float]:
    """Return the ends of an interval around `value`, moved out where it is narrower than
    `metric_interval` of predictions (N, C).
    """
    # Rows without a mistake have none in any resample: a bootstrap interval would have no width.
    task_kind, target = validation.task.kind, validation.target
    low, high = metric_interval(task_kind, target, predicted, metric, groups=validation.groups)
    pooled = score(task_kind, target, predicted, metric)
    if not np.isfinite([low, high, pooled, value]).all():
        return ends
    metric_min, metric_max = _metric_range(metric)
    return (
        max(min(ends[0], value - (pooled - low)), metric_min),
        min(max(ends[1], value + (high - pooled)), metric_max),
    )


def _metric_range(metric: str) -> tuple[float, float]:
    # losses have no upper end; R² has no lower one
    return -np.inf if metric == "r2" else 0.0, 1.0 if METRICS[metric].higher_is_better else np.inf


def compare_with_best(
    observed: Doubles, resampled: Doubles, hits: Mask | None = None
) -> pd.DataFrame:
    """Compare each head with the best one, on the same rows.

    observed: scores (K,), higher is better; resampled: scores (K, B). hits: (K, N) right and wrong
    predictions, for McNemar's test.

    Columns: difference (best minus this), low and high (its paired bootstrap interval, this pair
    alone), p_mcnemar (exact test of this pair alone), p_corrected (the share of resamples in which
    the largest of all chance deviations, less this head's own, reaches the lead),
    statistically_tied. The heads that are tied hold the truly best one with the confidence of LEVEL
    (selection of a subset: Gupta 1965; Hsu 1981).
    """
    best = int(np.lexsort((np.arange(len(observed)), -observed))[0])
    difference = observed[best] - observed
    chance = np.where(np.isfinite(resampled), resampled - observed[:, None], 0.0)
    tied = np.ones(len(observed), np.bool_)
    p_values = np.ones(len(observed))
    smallest_p = 0.0  # a head that leaves later has no smaller p than one that left before
    # A head that is told apart leaves, and the others are compared anew among themselves.
    while True:
        # The best was chosen for its score: its lead must be beyond what the luckiest head has.
        luckiest = chance[tied].max(0)
        share = (luckiest - chance[tied] >= difference[tied, None] - 1e-9).mean(1)
        p_values[tied] = np.maximum(share, smallest_p)
        leaving = tied & (p_values < 1 - LEVEL)
        leaving[best] = False
        if not leaving.any():
            break
        smallest_p = float(p_values[leaving].max())
        tied &= ~leaving
    p_values[best] = 1.0
    paired = chance[best] - chance + difference[:, None]
    low, high = np.quantile(paired, ENDS, axis=1)
    table = pd.DataFrame({"difference": difference, "low": low, "high": high})
    table["p_mcnemar"] = np.nan if hits is None else mcnemar(hits[best], hits)
    return table.assign(p_corrected=p_values, statistically_tied=tied)


def mcnemar(first: Mask, others: Mask) -> Doubles:
    """Return (K,) exact two-sided p-values of McNemar's test: is one predictor (N,) as often right
    as each of others (K, N)?
    """
    from scipy.special import bdtr  # binomial distribution function

    only_first, only_other = (first & ~others).sum(1), (~first & others).sum(1)
    fewer = np.minimum(only_first, only_other).astype(np.float64)
    return np.asarray(np.minimum(1.0, 2 * bdtr(fewer, only_first + only_other, 0.5)))


def _hits(task_kind: TaskKind, target: Array, predicted: Floats) -> Mask:
    """Return (K, N) whether predictions (K, N, C) are right."""
    if task_kind == "single":
        return np.asarray(predicted.argmax(2) == target)
    return np.asarray(((predicted >= 0.5) == (target >= 0.5)).all(2))
