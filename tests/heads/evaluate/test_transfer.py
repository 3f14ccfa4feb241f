"""Transfer scores equal their definitions, written out plainly, and say what they promise."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.covariance import ledoit_wolf

from headrace.heads.evaluate.transferability import (
    bayes_bounds,
    h_score,
    log_me,
    negative_conditional_entropy,
)

SHAPES = [(60, 8), (30, 50)]  # more rows than features, and fewer


def made(rows, width, seed=0, signal=1.0):
    """Features of three classes."""
    rng = np.random.default_rng(seed)
    target = rng.permutation(np.arange(rows) % 3)
    means = signal * rng.normal(size=(3, width))
    return means[target] + rng.normal(0, 1, (rows, width)) + 0.5, target


@pytest.mark.parametrize("shape", SHAPES)
def test_logme_is_the_largest_evidence(shape):
    """The density of the targets under the best prior and noise, found by a general optimizer on
    the full covariance.
    """
    X, target = made(*shape)
    onehot = np.eye(3)[target]

    def evidence(logs, y):
        alpha, beta = np.exp(logs)
        covariance = X @ X.T / alpha + np.eye(len(X)) / beta
        return multivariate_normal(np.zeros(len(X)), covariance, allow_singular=True).logpdf(
            y
        ) / len(X)

    best = [
        max(
            -minimize(lambda logs, y=y: -evidence(logs, y), start, method="Nelder-Mead").fun
            for start in ([0.0, 0.0], [2.0, 2.0])
        )
        for y in onehot.T
    ]
    assert log_me(X, onehot) == pytest.approx(np.mean(best), abs=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shrink", [True, False])
def test_h_score_is_its_definition(shape, shrink):
    """The trace of the inverse covariance times the covariance of class means, with scikit-learn's
    shrinkage.
    """
    X, target = made(*shape)
    centred = X - X.mean(0)
    between = np.cov(np.stack([centred[target == c].mean(0) for c in target]).T, bias=True)
    covariance, alpha = ledoit_wolf(X) if shrink else (np.cov(X.T, bias=True), 0.0)
    expected = np.trace(np.linalg.pinv(covariance, hermitian=True) @ ((1 - alpha) * between))
    assert h_score(X, target, shrink=shrink) == pytest.approx(expected, rel=1e-6)


def test_better_features_score_higher():
    """Each score, with three strengths of the signal."""
    found = []
    for signal in (0.1, 0.4, 1.5):
        X, target = made(200, 20, signal=signal)
        found.append((log_me(X, np.eye(3)[target]), h_score(X, target)))
    assert found == sorted(found)
    assert np.diff([score for _, score in found]).min() > 0.1
    assert 0 < found[0][1] < found[2][1] < 2


def test_nce_is_minus_the_conditional_entropy():
    """0 where the source names the target, minus the target's entropy where it says nothing, and by
    hand in between.
    """
    target = np.repeat([0, 1], 50)
    assert negative_conditional_entropy(target + 7, target) == 0
    assert negative_conditional_entropy(np.tile([3, 9], 50), target) == pytest.approx(-np.log(2))
    source = np.repeat([0, 1, 1, 1], 25)  # source 1 is target 0 once and target 1 twice
    expected = 0.75 * (1 / 3 * np.log(1 / 3) + 2 / 3 * np.log(2 / 3))
    assert negative_conditional_entropy(source, target) == pytest.approx(expected)


@pytest.mark.parametrize("classes", [2, 5])
def test_bayes_bounds_are_tight_under_label_noise(classes):
    """Labels replaced at rate e: one neighbour errs twice where labels are independent, and the
    lower bound is e itself.
    """
    error = 0.2
    neighbour = 1 - ((1 - error) ** 2 + error**2 / (classes - 1))
    low, high = bayes_bounds(neighbour, classes)
    assert low == pytest.approx(error)
    assert high == pytest.approx(neighbour)
    assert bayes_bounds(0.0, classes) == (0.0, 0.0)
    chance = (classes - 1) / classes
    assert bayes_bounds(1.0, classes) == pytest.approx((chance, chance))
