"""Metrics of many heads under many weightings: with weights that repeat rows, they are the metrics
of the repeated rows.
"""

import numpy as np
import pytest

from headrace.heads.errors import HeadError
from headrace.heads.evaluate.metrics import METRICS, score, weighted_scores

ROWS, HEADS, CLASSES = 61, 4, 3
CASES = [(kind, name) for name, metric in METRICS.items() for kind in metric.tasks]


def made(kind, rng):
    """Targets and predictions of some heads; few distinct values, so that ties occur."""
    predicted = (
        np.round(rng.dirichlet(np.ones(CLASSES), (HEADS, ROWS)), 1).astype(np.float32) + 0.01
    )
    if kind == "single":
        return rng.integers(0, CLASSES, ROWS), predicted / predicted.sum(2, keepdims=True)
    if kind == "multi":
        return rng.integers(0, 2, (ROWS, CLASSES)), predicted.clip(0, 1)
    return rng.normal(50, 1, (ROWS, CLASSES)), rng.normal(50, 1, (HEADS, ROWS, CLASSES)).astype(
        np.float32
    )


@pytest.mark.parametrize(("kind", "metric"), CASES)
def test_whole_weights_are_repeated_rows(kind, metric):
    """Every metric of every kind of task, in folds, ties and absent classes included."""
    rng = np.random.default_rng(0)
    target, predicted = made(kind, rng)
    fold = rng.integers(0, 2, ROWS)
    weights = rng.integers(0, 3, (ROWS, 6))
    weights[:, 0] = 1
    weights[fold == 0, 1] = 0  # a fold that is not drawn at all
    got = weighted_scores(kind, target, predicted, fold, metric, weights)
    for head in range(HEADS):
        for draw in range(weights.shape[1]):
            parts = []
            for number in (0, 1):
                rows = np.repeat(np.arange(ROWS), weights[:, draw] * (fold == number))
                parts.append(
                    score(kind, target[rows], predicted[head][rows], metric)
                    if len(rows)
                    else np.nan
                )
            assert got[head, draw] == pytest.approx(np.nanmean(parts), abs=2e-5, rel=1e-4)


def test_a_metric_of_another_task_is_refused():
    """With the metrics that there are."""
    with pytest.raises(HeadError, match="r2"):
        weighted_scores(
            "regression", np.ones(2), np.ones((1, 2, 1)), np.zeros(2), "accuracy", np.ones((2, 1))
        )


def test_where_nothing_is_defined_there_is_no_number():
    """AUC of rows of one class."""
    values = weighted_scores(
        "single", np.zeros(4, int), np.ones((1, 4, 2)) / 2, np.zeros(4, int), "auc", np.ones((4, 2))
    )
    assert np.isnan(values).all()
