"""The winner's corrected score is honest where the raw one is not, and the best head is among those
not told apart.
"""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from support.evidence import stored

from headrace.heads.data.task import Task
from headrace.pipelines.selection.correction import (
    assess_selection,
    choice_luck,
    chosen_scores,
    compare_with_best,
    left_out_rows,
    mcnemar,
    mean_and_interval,
    resampled_rows,
)
from headrace.pipelines.selection.predictions import read_predictions, validation_rows

HEADS, ROWS, WORLDS, RESAMPLES = 40, 250, 120, 150


def world(kind, rng):
    """True accuracies (K,) and right and wrong predictions (K, N) of heads in a made world."""
    if kind == "equal heads that share the hard images":
        hard = rng.normal(size=ROWS)
        return np.full(HEADS, 0.8), 0.8 * hard + 0.6 * rng.normal(size=(HEADS, ROWS)) < 0.8416
    truth = np.full(HEADS, 0.8) if kind == "equal heads" else rng.uniform(0.7, 0.8, HEADS)
    return truth, rng.random((HEADS, ROWS)) < truth[:, None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["equal heads", "equal heads that share the hard images", "heads of different worth"]
)
def test_the_corrected_score_is_unbiased_where_the_raw_one_is_optimistic(kind):
    """Over many worlds: raw too good by points, corrected within its own error (if anything, too
    low); and the interval holds the truth in at least 93 % of them, the set of heads not told apart
    the best one.
    """
    raw, new, inside, kept = [], [], [], []
    fold = np.arange(ROWS) % 5
    for seed in range(WORLDS):
        truth, right = world(kind, np.random.default_rng(seed))
        drawn = resampled_rows(fold, np.arange(ROWS), RESAMPLES, seed)
        left = left_out_rows(fold, np.arange(ROWS), RESAMPLES, seed)
        observed, drawn_scores = right.mean(1), right @ (drawn / drawn.sum(0))
        kept_scores = right @ ((1 - left) / (1 - left).sum(0))
        left_scores = right @ (left / left.sum(0))
        values = chosen_scores(kept_scores, left_scores, np.zeros(HEADS))
        winner = observed.argmax()
        expected, low, high = mean_and_interval(values, left.mean(), left_scores[winner])
        raw.append(observed[winner] - truth[winner])
        new.append(expected - truth[winner])
        inside.append(low <= truth[winner] <= high)
        kept.append(compare_with_best(observed, drawn_scores)["statistically_tied"][truth.argmax()])
    error = np.std(new) / np.sqrt(WORLDS)
    assert np.mean(raw) > 0.03
    assert -0.008 - 3 * error < np.mean(new) < 3 * error
    assert np.mean(inside) >= 0.93
    assert np.mean(kept) >= 0.93


def test_a_head_that_is_far_ahead_is_told_apart():
    """From all others; and two that differ by one row are not."""
    rng = np.random.default_rng(0)
    right = rng.random((HEADS, ROWS)) < 0.6
    right[3] = rng.random(ROWS) < 0.95
    drawn = resampled_rows(np.zeros(ROWS, int), np.arange(ROWS), 300, 0)
    scores = right @ (drawn / drawn.sum(0))
    table = compare_with_best(right.mean(1), scores, right)
    assert np.flatnonzero(table["statistically_tied"]).tolist() == [3]
    assert (table["p_corrected"].drop(3) < 0.05).all()
    right[7] = right[3]
    right[7, 0] ^= True
    table = compare_with_best(right.mean(1), right @ (drawn / drawn.sum(0)), right)
    assert np.flatnonzero(table["statistically_tied"]).tolist() == [3, 7]
    assert table.loc[7 if right[3].sum() > right[7].sum() else 3, "p_mcnemar"] == 1.0


def test_mcnemar_is_the_exact_binomial_test():
    """On the rows where the two disagree."""
    rng = np.random.default_rng(1)
    first, others = rng.random(60) < 0.8, rng.random((5, 60)) < 0.6
    for p, other in zip(mcnemar(first, others), others, strict=True):
        only = int((first & ~other).sum())
        assert p == pytest.approx(binomtest(only, only + int((~first & other).sum())).pvalue)


def test_rows_of_one_group_are_drawn_together():
    """And each fold draws as many groups as it has."""
    groups = np.repeat(np.arange(20), 3)
    fold = np.repeat([0, 1], 30)
    drawn = resampled_rows(fold, groups, 50, 0)
    assert (drawn.reshape(20, 3, 50) == drawn[::3][:, None]).all()
    assert (drawn[:30].sum(0) == 30).all()


def test_a_fifth_of_each_folds_groups_is_left_out():
    """One at least, and never all of a fold."""
    groups = np.concatenate([np.repeat(np.arange(20), 3), [20, 20, 21, 22]])
    fold = np.concatenate([np.repeat([0, 1], 30), [2, 2, 2, 3]])
    left = left_out_rows(fold, groups, 50, 0)
    assert (left[:60].reshape(20, 3, 50) == left[:60:3][:, None]).all()
    assert (left[:30].sum(0) == 6).all()
    assert np.isin(left[60:63].sum(0), (1, 2)).all()
    assert not left[63].any()


def test_the_luck_of_a_choice_is_what_the_best_of_equals_seems_better_by():
    """Ten heads of the same worth on 300 rows: the best is 1.5 standard errors too good; one head
    alone is not.
    """
    found = []
    for seed in range(20):
        right = (np.random.default_rng(seed).random((10, 300)) < 0.5).astype(float)
        found.append(choice_luck(right, np.arange(300) % 5, np.arange(300)))
        assert abs(choice_luck(right[:1], np.arange(300) % 5, np.arange(300))) < 0.01
    assert np.mean(found) == pytest.approx(1.54 * 0.5 / np.sqrt(300), abs=0.012)


def test_ties_go_to_the_cheaper_head():
    """Not to the one that the left-out rows favour."""
    inside, outside = np.full((2, 4), 0.9), np.array([[1.0] * 4, [0.5] * 4])
    assert chosen_scores(inside, outside, np.array([8, 4])).tolist() == [0.5] * 4


@pytest.mark.parametrize(
    ("kind", "metric"),
    [("single", "accuracy"), ("single", "log_loss"), ("single", "auc"), ("multi", "average_precision"),
     ("regression", "r2"), ("regression", "rmse")],
)  # fmt: skip
def test_any_metric_of_any_task(tmp_path, kind, metric):
    """From results on disk: the winner's own score as the leaderboard has it, less its luck; the
    winner is among its equals, and the cheapest of them is one of them.
    """
    board, task = stored(tmp_path, kind, metric)
    found = assess_selection(board, validation_rows(task), metric)
    assert found.validation == board[metric].iloc[0]
    assert found.low < found.expected < found.high
    assert found.optimism > -0.02
    assert found.tried == 6
    assert found.images == 72
    assert found.table["difference"].iloc[0] == 0
    observed = (board[metric].iloc[0] - board[metric]).abs().to_numpy()
    assert found.table["difference"].to_numpy() == pytest.approx(observed, abs=1e-5)
    equals = found.table.loc[found.table["statistically_tied"], "rank"].tolist()
    assert equals[0] == 1
    assert found.cheapest == min(equals, key=lambda rank: board["features"][rank - 1])
    assert found.summary() == assess_selection(board, validation_rows(task), metric).summary()


def test_r2_of_few_rows_is_not_judged_by_two_or_three_of_them(tmp_path):
    """Forty held-out images in five folds: what a good head is expected to score is near what it
    scores.
    """
    rng = np.random.default_rng(0)
    target = rng.normal(size=(48, 2))
    outputs = [target + rng.normal(0, 0.15 + 0.02 * k, target.shape) for k in range(6)]
    board, task = stored(tmp_path, "regression", "r2", outputs=outputs, target=target, folds=5)
    found = assess_selection(board, validation_rows(task), "r2")
    assert abs(found.expected - found.validation) < 0.05
    assert found.low > 0.8


def test_results_of_other_rows_are_matched_by_id_or_left_out(tmp_path):
    """Never by position."""
    board, task = stored(tmp_path, "single", "accuracy")
    (places, straight), *_ = read_predictions(board, validation_rows(task))
    order = np.random.default_rng(0).permutation(len(task.ids))
    mixed = Task(
        task.kind,
        task.classes,
        task.ids[order],
        task.content[order],
        task.target[order],
        task.fold[order],
        task.weight,
    )
    held = validation_rows(mixed)
    (again, turned), *_ = read_predictions(board, held)
    assert (places == again).all()
    rank = {row: place for place, row in enumerate(validation_rows(task).images)}
    assert (turned == straight[:, [rank[order[row]] for row in held.images]]).all()
    stranger = Task(
        *[*vars(mixed).values()][:3],
        np.roll(mixed.content, 1),
        mixed.target,
        mixed.fold,
        mixed.weight,
    )
    assert list(read_predictions(board, validation_rows(stranger))) == []


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "macro_f1"])
def test_the_expected_score_of_a_few_wrong_rows_is_no_less_than_nothing(metric):
    """What the shares of the classes are worth may be more than the whole score."""
    target, rows = np.array([0, 0, 1, 1]), np.arange(4)
    names = rows.astype("U1")
    task = Task(
        "single", ("a", "b"), names, names.astype("S1"), target, rows.astype(np.int16) % 2,
        np.ones(4),
    )  # fmt: skip
    wrong = (np.eye(2)[1 - target] * 0.1 + 0.45).astype(np.float32)
    board = pd.DataFrame({"rank": [1, 2], "features": [1, 2], metric: [0.0, 0.0]})
    blocks = [(np.arange(2), np.stack([wrong, wrong]))]
    found = assess_selection(board, validation_rows(task), metric, blocks=blocks)
    assert 0 <= found.low <= found.expected <= found.high <= 1
