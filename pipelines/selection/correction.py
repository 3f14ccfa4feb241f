"""What the winner may be expected to score on new images, and which heads cannot be told apart from
it.

K heads, N held-out rows, B resamples. The best of K validation scores is too good: part of it is
luck. The correction is that of Tsamardinos, Greasidou and Borboudakis (2018), "Bootstrapping the
out-of-sample predictions for efficient and accurate cross-validation" (BBC-CV): the choice is
repeated on resampled rows, and each time the chosen head is scored on the rows that were not drawn.
No head is trained again.

That is the score on new rows with the classes in the same shares. Folds are stratified, so held-out
rows have the very shares that their heads were trained on, and where shares are a matter of chance,
new rows have not: `share_optimism` is taken off.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.intervals import metric_interval
from headrace.heads.evaluate.metrics import METRICS, row_hits, score
from headrace.heads.evaluate.temperature import FLOOR, fit_temperature, floor_of, with_temperature
from headrace.heads.evaluate.weighted import SORTED_METRICS, weighted_scores
from headrace.pipelines.selection.calibration import Calibration, calibrate, calibrated
from headrace.pipelines.selection.predictions import (
    ValidationRows,
    read_predictions,
    stacked_predictions,
)

Floats = npt.NDArray[np.float64]

RESAMPLES = 500
LEVEL = 0.95
_SHARE_BUDGET = 2e8  # numbers of a head's predictions that the drawn shares may look at: a second
# Metrics made of sorted rows cost K × N × C × B without a matrix product: fewer heads and
# resamples, a second or two.
SORTED_BUDGET = 4e8
SORTED_RESAMPLES = 200


@dataclass(frozen=True)
class Selection:
    """What choosing the best of `tried` settings has cost in honesty, and how sure the
    choice is.
    """

    metric: str
    tried: int  # settings that the winner was chosen from
    images: int  # held-out rows that they were compared on
    resamples: int
    validation: float  # the winner's own validation score: the best of `tried`, and so too good
    # the same at the winner's temperature, cross-fitted: only log loss and the like are others
    calibrated: float
    expected: float  # the score to expect of it, at its temperature, on new images
    low: float  # 95 % interval of `expected`
    high: float
    # settings that cannot be told apart from the best with 95 % confidence, the winner included
    together: int
    # of those the rank (from 1, in the leaderboard) of the one with the fewest features
    cheapest: int
    calibration: Calibration | None  # of the winner; None for regression
    table: pd.DataFrame  # one row per compared setting; see `compare_with_best`

    @property
    def optimism(self) -> float:
        """By how much the validation score is too good, >= 0 apart from resampling noise, whatever
        the metric.
        """
        return (self.calibrated - self.expected) * (
            1 if METRICS[self.metric].higher_is_better else -1
        )

    def summary(self) -> dict[str, Any]:
        """Everything but the table, for JSON: an undefined number is None."""
        values = {name: value for name, value in vars(self).items() if name != "table"} | {
            "optimism": self.optimism
        }
        values["calibration"] = None if self.calibration is None else self.calibration.summary()
        return {name: None if value != value else value for name, value in values.items()}


def assess_selection(
    board: pd.DataFrame,
    held: ValidationRows,
    metric: str,
    *,
    seed: int = 0,
    blocks: Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]] | None = None,
    halving_luck: tuple[float, Floats] | None = None,
) -> Selection | None:
    """The selection among the whole heads of a leaderboard (best first); None where fewer than two
    rows are held out.

    blocks: (places in the board, predictions (k, N, C)), by default those that are stored.
    halving_luck: after a successive halving of inputs on the same rows, the luck of its choice and
    the errors (N,) of the winner's input in it. So much of that luck is in the winner's score as
    its own errors are those. Deterministic in the seed.
    """
    kind, classes = held.task.kind, max(1, len(held.task.classes))
    resamples = RESAMPLES
    if metric in SORTED_METRICS:
        resamples = SORTED_RESAMPLES
        most = int(SORTED_BUDGET / (2 * resamples * len(held.rows) * classes))
        board = board.head(max(most, 2))  # a head far down never wins a resample
    drawn = resampled_rows(held.fold, held.groups, resamples, seed)
    left = (drawn == 0).astype(np.float64)
    if not left.any():
        return None
    seen = np.concatenate([np.ones((len(drawn), 1)), drawn], axis=1)
    # The few rows of one fold that were not drawn may hardly differ, and R² among them is then far
    # below anything real.
    left_fold = np.zeros_like(held.fold) if metric == "r2" else held.fold
    places, parts, wins = [], [], []
    first: npt.NDArray[np.float32] | None = None
    for block, predicted in read_predictions(board, held) if blocks is None else blocks:
        places.append(block)
        if first is None or block.min() <= min(map(np.min, places)):
            first = predicted[int(block.argmin())]
        scored = [
            weighted_scores(kind, held.target, predicted, fold, metric, weights)
            for fold, weights in ((held.fold, seen), (left_fold, left))
        ]
        parts.append(np.concatenate(scored, axis=1))
        wins.append(_right(kind, held.target, predicted) if metric == "accuracy" else None)
    if first is None:
        return None
    order = np.argsort(np.concatenate(places))
    place = np.concatenate(places)[order]
    scores = np.concatenate(parts)[order] * (1 if METRICS[metric].higher_is_better else -1)
    right = (
        np.concatenate([win for win in wins if win is not None])[order]
        if metric == "accuracy"
        else None
    )
    compared = board.iloc[place]
    observed, inside, outside = (
        scores[:, 0],
        scores[:, 1 : 1 + resamples],
        scores[:, 1 + resamples :],
    )
    cost = compared["features"].to_numpy()
    values = chosen_scores(inside, outside, cost)
    expected, low, high = corrected(values, share=float(left.mean()))
    back = 1 if METRICS[metric].higher_is_better else -1
    optimism = share_optimism(held, first, metric) if is_stratified(held) else 0.0
    if halving_luck is not None and metric in ("accuracy", "hamming_accuracy"):
        optimism += halving_luck[0] * _likeness(
            halving_luck[1], 1 - row_hits(kind, held.target, first, metric)
        )
    # Of simulated boards nothing is known but scores.
    floor = floor_of(compared["spec"].iloc[0], kind, classes) if "spec" in compared else FLOOR
    told = calibrated(held, first, floor)
    # What the temperature changes is the same for all rows' luck: it is added, and the choice was
    # made without it.
    gained = _mean_score(held, told, metric) - _mean_score(held, first, metric)
    expected, low, high = (back * value - optimism + gained for value in (expected, low, high))
    low, high = no_narrower(held, told, metric, expected, (min(low, high), max(low, high)))
    table = compare_with_best(observed, inside, right)
    table.insert(0, "rank", compared["rank"].to_numpy())
    together = table["together"].to_numpy()
    cheapest = np.lexsort((-observed, np.where(together, cost, np.inf)))[0]
    return Selection(
        metric=metric,
        tried=len(place),
        images=len(held.rows),
        resamples=int(np.isfinite(values).sum()),
        validation=float(compared[metric].iloc[0]),
        calibrated=float(compared[metric].iloc[0]) + gained,
        expected=expected,
        low=low,
        high=high,
        together=int(together.sum()),
        cheapest=int(compared["rank"].iloc[cheapest]),
        calibration=calibrate(held, first, floor),
        table=table,
    )


def _mean_score(held: ValidationRows, predicted: npt.NDArray[Any], metric: str) -> float:
    """The mean over folds of one head's metric (N, C), as the leaderboard has it."""
    weights = np.ones((len(held.rows), 1))
    return float(
        weighted_scores(held.task.kind, held.target, predicted[None], held.fold, metric, weights)[
            0, 0
        ]
    )


def resampled_rows(
    fold: npt.NDArray[Any], groups: npt.NDArray[Any], resamples: int, seed: int
) -> npt.NDArray[np.float64]:
    """(N, B) how often each row is drawn.

    As many groups are drawn, with replacement, as each fold has.
    """
    rng = np.random.default_rng(seed)
    drawn = np.zeros((len(fold), resamples))
    for number in np.unique(fold):
        rows = np.flatnonzero(fold == number)
        own = np.unique(groups[rows], return_inverse=True)[1]
        count = int(own.max()) + 1
        drawn[rows] = rng.multinomial(count, np.full(count, 1 / count), resamples).T[own]
    return drawn


def chosen_scores(inside: Floats, outside: Floats, cost: npt.NDArray[Any]) -> Floats:
    """(B,) the score on rows that were not drawn, of the head that is best on those that were;
    higher is better.

    inside, outside: (K, B). Ties go to the cheaper head. nan where nothing is defined.
    """
    best = best_heads(inside, cost)
    return np.asarray(outside[best, np.arange(inside.shape[1])])


def choice_luck(
    scores: Floats, fold: npt.NDArray[Any], groups: npt.NDArray[Any], *, seed: int = 0
) -> float:
    """By how much the best mean of row scores (K, N), higher better, is higher than what choosing
    it yields on other rows.
    """
    drawn = resampled_rows(fold, np.unique(groups, return_inverse=True)[1], RESAMPLES, seed)
    left = (drawn == 0).astype(np.float64)
    inside, outside = (
        scores @ weights / np.maximum(weights.sum(0), 1) for weights in (drawn, left)
    )
    return float(
        scores.mean(1).max() - chosen_scores(inside, outside, np.zeros(len(scores))).mean()
    )


def best_heads(scores: Floats, cost: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """(B,) the head that is best by each column of scores (K, B), higher is better; ties go to the
    cheaper head.
    """
    by_cost = np.argsort(cost, kind="stable")
    # The leaderboard's order would break ties by the very rows that are left out.
    ranked = np.round(np.where(np.isfinite(scores), scores, -np.inf)[by_cost], 6)
    return np.asarray(by_cost[ranked.argmax(0)], np.int64)


def nested_choice(
    board: pd.DataFrame, held: ValidationRows, metric: str, part: npt.NDArray[np.int64]
) -> Floats:
    """(N, C) predictions of each part of the rows by the head that is best on the other parts, at
    the temperature that these give it: what choosing the best of the board is worth, without the
    luck of the rows that it was chosen on.

    part: (N,) which part a row is in. Only rows of the board whose predictions are whole can be
    chosen; there is one. Of very many heads and a metric made of sorted rows only the board's best
    are tried, and with them some of its luck.
    """
    numbers = np.unique(part)
    others = (part[:, None] != numbers).astype(np.float64)
    tried = board
    if metric in SORTED_METRICS:
        elements = len(held.rows) * max(1, len(held.task.classes)) * len(numbers)
        tried = board.head(max(int(SORTED_BUDGET / elements), 2))
    places, scores = [], []
    for some in (tried, board):  # the second only where none of the first has whole predictions
        for block, predicted in read_predictions(some, held):
            places.append(block)
            scores.append(
                weighted_scores(held.task.kind, held.target, predicted, held.fold, metric, others)
            )
        if places:
            break
    place = np.concatenate(places)
    sign = 1 if METRICS[metric].higher_is_better else -1
    best = place[best_heads(sign * np.concatenate(scores), board["features"].to_numpy()[place])]
    few, position = np.unique(best, return_inverse=True)
    told, chosen = stacked_predictions(board.iloc[few], held)
    assert len(told) == len(few)  # they were whole a moment ago
    nested, kind = np.zeros(chosen.shape[1:]), held.task.kind
    floors = [
        floor_of(spec, kind, len(held.task.classes)) for spec in board["spec"].to_numpy()[few]
    ]
    for number, own in zip(numbers, position, strict=True):
        inside = part != number
        given = held.weight[inside]
        temperature = fit_temperature(
            kind, held.target[inside], chosen[own][inside], given, floors[own]
        )
        nested[~inside] = with_temperature(kind, chosen[own][~inside], temperature, floors[own])
    return nested


def corrected(values: Floats, share: float, level: float = LEVEL) -> tuple[float, float, float]:
    """The mean of the out-of-bag scores, and the interval of that mean.

    Each score is one of `share` of the rows and varies more than one of all rows would; the
    quantiles are drawn together by the factor of the delete-d jackknife, √(share / (1 - share))
    (Shao and Wu 1989).
    """
    found = values[np.isfinite(values)]
    if len(found) == 0:
        return float("nan"), float("nan"), float("nan")
    middle = float(found.mean())
    narrower = min(1.0, float(np.sqrt(share / (1 - share)))) if share < 1 else 1.0
    below, above = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]) - middle
    return (
        middle,
        middle + narrower * min(0.0, float(below)),
        middle + narrower * max(0.0, float(above)),
    )


def _likeness(first: Floats, second: Floats) -> float:
    """The correlation of two heads' errors on the same rows, 0 to 1."""
    first, second = (
        np.nan_to_num(first),
        second.reshape(len(second), -1).mean(1),
    )  # nan: a fold that the halving left out
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return max(0.0, float(np.corrcoef(first, second)[0, 1]))


def is_stratified(held: ValidationRows) -> bool:
    """Whether each class is dealt evenly to the folds, as folds that are drawn have it and a user's
    own hardly ever.
    """
    if held.task.kind != "single" or len(np.unique(held.fold)) < 2:
        return False
    counts = np.array([np.bincount(held.target[held.fold == fold], minlength=len(held.task.classes))
                       for fold in np.unique(held.fold)])  # fmt: skip
    return bool((np.ptp(counts, axis=0) <= 1).all() and counts.sum() > len(counts))


def share_optimism(
    held: ValidationRows,
    predicted: npt.NDArray[Any],
    metric: str,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> float:
    """By how much more a head (N, C) scores on rows with the class shares that it was trained on
    than on new ones, whose shares are those of the population; in the metric's own direction.

    A parametric bootstrap: from shares for the population's, training shares are drawn; the head is
    taken there by Bayes' rule (its probabilities × the ratio of the shares; Saerens, Latinne and
    Decaestecker 2002, "Adjusting the outputs of a classifier to new a priori probabilities", Neural
    Computation 14:21-41), and scored on rows of the drawn shares, and of the population's. Those
    are the held-out rows' shares, drawn to equal ones by as much as chance alone would have them
    differ (James and Stein 1961): with ten equal classes and 150 rows nearly all of their spread is
    chance, and would be taken for something to learn. What a head makes of the shares fades with 1
    / N.
    """
    shares = np.bincount(held.target, minlength=predicted.shape[1]) / len(held.target)
    present = shares > 0
    equal = present / present.sum()
    chance = (equal * (1 - equal)).sum() / len(held.target)
    spread = ((shares - equal) ** 2).sum()
    population = equal + max(0.0, 1 - chance / spread if spread > 0 else 0.0) * (shares - equal)
    rng = np.random.default_rng(seed)
    resamples = int(min(resamples, max(10, _SHARE_BUDGET / predicted.size)))
    if metric in SORTED_METRICS:
        resamples = min(resamples, 20)
    one_fold = np.zeros(len(held.target), np.int64)
    gaps = []
    of_new = (population / np.where(present, shares, 1))[held.target]
    for drawn in rng.multinomial(len(held.target), population, resamples) / len(held.target):
        ratio = drawn / np.where(present, shares, 1)
        moved = predicted * ratio
        total = moved.sum(1, keepdims=True)
        moved = np.where(total > 0, moved / np.where(total > 0, total, 1), predicted)
        weights = np.stack([ratio[held.target], of_new], axis=1)
        as_trained, as_new = weighted_scores(
            "single", held.target, moved[None], one_fold, metric, weights
        )[0]
        gaps.append(as_trained - as_new)
    gap = float(np.nanmean(gaps))
    return gap if np.isfinite(gap) else 0.0


def no_narrower(
    held: ValidationRows,
    predicted: npt.NDArray[Any],
    metric: str,
    value: float,
    ends: tuple[float, float],
    level: float = LEVEL,
) -> tuple[float, float]:
    """Ends of an interval around `value`, moved out to where those of one head's score are,
    predictions (N, C).

    Resampled rows without a mistake have none, and would be sure of a perfect score.
    """
    kind = held.task.kind
    low, high = metric_interval(
        kind, held.target, predicted, metric, groups=held.groups, level=level
    )
    pooled = score(kind, held.target, predicted, metric)
    if not np.isfinite([low, high, pooled, value]).all():
        return ends
    most = 1.0 if METRICS[metric].higher_is_better else np.inf  # of losses; R² and shares end at 1
    least = -np.inf if metric == "r2" else 0.0
    return max(min(ends[0], value - (pooled - low)), least), min(
        max(ends[1], value + (high - pooled)), most
    )


def compare_with_best(
    observed: Floats,
    resampled: Floats,
    right: npt.NDArray[np.bool_] | None = None,
    level: float = LEVEL,
) -> pd.DataFrame:
    """Each head against the best, on the same rows. observed (K,), resampled (K, B): higher is
    better.

    Columns: difference (best minus this), low and high (its paired bootstrap interval, this pair
    alone), p_mcnemar (exact test of this pair alone; right: (K, N) right and wrong predictions),
    p_corrected, together.

    The best was chosen for its score, and so its lead must be beyond what the luckiest of all heads
    would have by chance: p_corrected is the share of resamples in which the largest of all chance
    deviations, less this head's own, reaches the lead. The heads that are `together` hold the truly
    best one with the confidence of `level` (selection of a subset: Gupta 1965; Hsu 1981). A head
    that is told apart leaves, and the others are compared anew among themselves.
    """
    best = int(np.lexsort((np.arange(len(observed)), -observed))[0])
    difference = observed[best] - observed
    chance = np.where(np.isfinite(resampled), resampled - observed[:, None], 0.0)
    together = np.ones(len(observed), np.bool_)
    p = np.ones(len(observed))
    smallest = 0.0  # a head that leaves later has no smaller p than one that left before
    while True:
        luckiest = chance[together].max(0)
        share = (luckiest - chance[together] >= difference[together, None] - 1e-9).mean(1)
        p[together] = np.maximum(share, smallest)
        leaving = together & (p < 1 - level)
        leaving[best] = False
        if not leaving.any():
            break
        smallest = float(p[leaving].max())
        together &= ~leaving
    p[best] = 1.0
    paired = chance[best] - chance + difference[:, None]
    low, high = np.quantile(paired, [(1 - level) / 2, (1 + level) / 2], axis=1)
    table = pd.DataFrame({"difference": difference, "low": low, "high": high})
    table["p_mcnemar"] = np.nan if right is None else mcnemar(right[best], right)
    return table.assign(p_corrected=p, together=together)


def mcnemar(first: npt.NDArray[np.bool_], others: npt.NDArray[np.bool_]) -> Floats:
    """(K,) exact two-sided p-values of McNemar's test: is one predictor (N,) as often right as each
    of others (K, N)?
    """
    from scipy.special import bdtr  # binomial distribution function

    only_first, only_other = (first & ~others).sum(1), (~first & others).sum(1)
    fewer = np.minimum(only_first, only_other).astype(np.float64)
    return np.asarray(np.minimum(1.0, 2 * bdtr(fewer, only_first + only_other, 0.5)))


def _right(
    kind: TaskKind, target: npt.NDArray[Any], predicted: npt.NDArray[np.float32]
) -> npt.NDArray[np.bool_]:
    if kind == "single":
        return np.asarray(predicted.argmax(2) == target)
    return np.asarray(((predicted >= 0.5) == (target >= 0.5)).all(2))
