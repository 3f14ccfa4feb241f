"""Ranking: the right direction, over whole heads only, with errors of the mean that are errors of
the mean.
"""

import numpy as np
import pandas as pd
import pytest

from headrace.heads.data.task import REFIT
from headrace.heads.linear.kind import LogisticSpec
from headrace.heads.spec import spec_to_json
from headrace.pipelines.planning.leaderboard import NoWinner, choose_winner
from headrace.pipelines.recipe.grid import requested_heads
from headrace.pipelines.recipe.heads import Heads
from headrace.pipelines.stages.select import rank_heads

WIDTHS = {"a.avg": 4, "b.avg": 8}


def head(name, C, scores, metric="accuracy", errors=(), final=True):
    """One spec's rows: a fold each, and the head on all rows."""
    spec = spec_to_json(LogisticSpec(C=C))
    rows = [
        {
            "inputs": (name,),
            "kind": "logistic",
            "spec": spec,
            "fold": fold,
            metric: score,
            "seconds": 1.0,
            "path": "p",
        }
        | {"error": "it broke" if fold in errors else None}
        for fold, score in enumerate(scores)
    ]
    if final:
        rows.append({**rows[0], "fold": REFIT, metric: np.nan, "error": None})
    return rows


def ranked(*heads, metric="accuracy", n_folds=2):
    return rank_heads(
        pd.DataFrame([row for rows in heads for row in rows]), metric, WIDTHS, n_folds
    )


def test_the_best_mean_wins_in_the_metric_s_own_direction():
    """Higher accuracy, lower log-loss."""
    board = ranked(head("a.avg", 1, [0.8, 0.9]), head("b.avg", 1, [0.9, 0.9]))
    assert board["inputs"].tolist() == [("b.avg",), ("a.avg",)]
    assert board["accuracy"].tolist() == pytest.approx([0.9, 0.85])
    board = ranked(
        head("a.avg", 1, [0.8, 0.9], "log_loss"),
        head("b.avg", 1, [0.9, 0.9], "log_loss"),
        metric="log_loss",
    )
    assert board["inputs"].tolist() == [("a.avg",), ("b.avg",)]


def test_ties_go_to_the_narrower_input():
    """Equal means: fewer features."""
    board = ranked(head("b.avg", 1, [0.9, 0.8]), head("a.avg", 1, [0.8, 0.9]))
    assert board["features"].tolist() == [4, 8]


def test_ties_of_one_width_go_to_the_smaller_log_loss():
    """Not to the first in the alphabet, which is the strongest regularization."""

    def with_losses(rows, loss):
        return [{**row, "log_loss": loss if row["fold"] >= 0 else np.nan} for row in rows]

    board = ranked(
        with_losses(head("a.avg", 1e-4, [1.0, 1.0]), 0.68),
        with_losses(head("a.avg", 10, [1.0, 1.0]), 0.05),
        with_losses(head("a.avg", 1e3, [1.0, 1.0]), 0.06),
        with_losses(head("b.avg", 10, [1.0, 1.0]), 0.01),
    )
    assert board["settings"].tolist() == ["C=10", "C=1000", "C=0.0001", "C=10"]
    assert board["features"].tolist() == [4, 4, 4, 8]


def test_the_standard_error_is_that_of_the_mean_over_folds():
    """Sample standard deviation over the root of the number of folds."""
    scores = [0.7, 0.8, 0.75, 0.9]
    board = ranked(head("a.avg", 1, scores), n_folds=4)
    assert board["standard_error"][0] == pytest.approx(np.std(scores, ddof=1) / 2)


@pytest.mark.parametrize(
    "broken",
    [
        head("b.avg", 1, [1.0, np.nan]),  # the metric is undefined in a fold
        head("b.avg", 1, [1.0, np.nan], errors=[1]),  # a fold's head failed
        head("b.avg", 1, [1.0]),  # a fold is missing
        head("b.avg", 1, [1.0, 1.0], final=False),  # stopped by halving: never trained on all rows
    ],
)
def test_a_head_that_is_not_whole_never_wins(broken):
    """A mean over fewer folds, or fewer epochs, is no mean to compare."""
    board = ranked(broken, head("a.avg", 1, [0.5, 0.5]))
    assert board["inputs"].tolist() == [("a.avg",), ("b.avg",)]
    assert choose_winner(board, pd.DataFrame(broken), "accuracy").inputs == ("a.avg",)


def test_without_a_whole_head_the_reason_is_told():
    """The commonest error of the heads."""
    rows = head("a.avg", 1, [np.nan, np.nan], errors=[0, 1], final=False)
    with pytest.raises(NoWinner, match="it broke"):
        choose_winner(ranked(rows), pd.DataFrame(rows), "accuracy")


def test_a_value_that_a_list_repeats_counts_once():
    """No head is averaged with itself."""
    heads = Heads.model_validate({"logistic": {"C": [1], "class_weight": ["none", "none"]}})
    assert len(requested_heads(heads, ["a.avg"])) == 1
