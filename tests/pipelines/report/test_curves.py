"""ROC and precision-recall curves: every point is scikit-learn's."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from headrace.pipelines.report.curves import curve_set, one_curve


def assert_points_of_scikit_learn(curve, truth, scores):
    """At each threshold of the curve, the rates and the precision are scikit-learn's."""
    false_rate, true_rate, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    at = {threshold: place for place, threshold in enumerate(thresholds.tolist())}
    places = [at[float(threshold)] for threshold in curve.thresholds]
    assert (curve.true_positives / curve.positives).tolist() == true_rate[places].tolist()
    assert (curve.false_positives / curve.negatives).tolist() == false_rate[places].tolist()
    precision, recall, thresholds = precision_recall_curve(truth, scores)
    at = {threshold: place for place, threshold in enumerate(thresholds.tolist())}
    places = [at[float(threshold)] for threshold in curve.thresholds]
    shown = curve.true_positives.astype(float) / (curve.true_positives + curve.false_positives)
    assert shown.tolist() == precision[places].tolist()
    assert (curve.true_positives / curve.positives).tolist() == recall[places].tolist()
    assert curve.auc == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
    assert curve.average_precision == pytest.approx(average_precision_score(truth, scores))


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 1, width=32)), min_size=2, max_size=60).filter(
        lambda rows: len({truth for truth, _ in rows}) == 2
    )
)
def test_a_small_curve_has_every_threshold(rows):
    """Ties are one point; all thresholds are there."""
    truth, scores = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], "f4")
    curve = one_curve("c", truth, scores, 256)
    assert curve.thresholds.tolist() == sorted(set(scores.tolist()), reverse=True)
    assert_points_of_scikit_learn(curve, truth, scores)


def test_a_large_curve_keeps_its_ends_and_one_half():
    """Of 20,000 distinct scores at most 257 points, all of them scikit-learn's."""
    rng = np.random.default_rng(0)
    truth = rng.random(20_000) < 0.1
    scores = (1 / (1 + np.exp(-(rng.normal(size=20_000) + 2 * truth - 1)))).astype(np.float32)
    curve = one_curve("c", truth, scores, 256)
    assert 200 < len(curve.thresholds) <= 257
    assert (curve.thresholds[0], curve.thresholds[-1]) == (scores.max(), scores.min())
    assert scores[scores >= 0.5].min() in curve.thresholds
    assert_points_of_scikit_learn(curve, truth, scores)


def test_two_classes_have_one_curve_and_more_have_one_each():
    """Of two, the second's; of three, the hardest is chosen; a class that nothing has, has none."""
    target = np.array([0, 1, 0, 1])
    predicted = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.5, 0.5]], np.float32)
    (curve,) = curve_set("single", ("a", "b"), target, predicted, "test", "the winner").curves
    assert (curve.name, curve.positives, curve.true_positives.tolist()) == ("b", 2, [1, 1, 2, 2])
    three = np.array([[0.8, 0.1, 0.1], [0.1, 0.5, 0.4], [0.7, 0.2, 0.1], [0.1, 0.4, 0.5]], "f4")
    made = curve_set("single", ("a", "b", "c"), np.array([0, 1, 0, 1]), three, "test", "x")
    assert [curve.name for curve in made.curves] == ["a", "b"]
    labels = curve_set("multi", ("p", "q"), np.eye(4)[:, :2], three[:, :2], "test", "x")
    assert [curve.name for curve in labels.curves] == ["p", "q"]
    assert labels.chosen == int(np.argmin([curve.auc for curve in labels.curves]))
