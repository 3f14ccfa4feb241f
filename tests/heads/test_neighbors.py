"""Neighbour search and class means against scikit-learn."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor, NearestCentroid

from headrace.heads.data.folds import make_folds
from headrace.heads.data.task import REFIT, TEST
from headrace.heads.data.training_data import TrainingData
from headrace.heads.evaluate.metrics import score
from headrace.heads.neighbors.bank import fit_centroid_bank, fit_knn_bank
from headrace.heads.neighbors.kind import CentroidSpec, KNNSpec
from headrace.heads.predict import predict_head

Arrays = np.ndarray[Any, Any]

SPECS = [
    KNNSpec(k, metric, weighting)  # type: ignore[arg-type]
    for k in (1, 5, 20)
    for metric in ("cosine", "euclidean")
    for weighting in ("uniform", "distance")
]


def digits(rows: int = 500) -> tuple[Arrays, Arrays, Arrays]:
    X, y = load_digits(return_X_y=True)
    # Noise makes all distances differ: scikit-learn and we may order exact ties differently.
    noise = np.random.default_rng(0).normal(size=X[:rows].shape)
    return (X[:rows] + noise).astype(np.float32), y[:rows], make_folds(y[:rows], n_folds=2, seed=0)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_every_k_metric_and_fold_equals_scikit_learn(offset: float) -> None:
    """One pass gives what a fit of KNeighborsClassifier per setting and fold gives, also far from
    the origin.
    """
    X, y, fold = digits()
    X = X + np.float32(offset)
    for fit in fit_knn_bank(TrainingData(X, y, fold, 10), SPECS, refit=False):
        assert isinstance(fit.spec, KNNSpec)
        train, held = fold != fit.fold, fold == fit.fold
        model = KNeighborsClassifier(
            fit.spec.k, metric=fit.spec.metric, weights=fit.spec.weighting, algorithm="brute"
        ).fit(X[train].astype(np.float64), y[train])
        expected = model.predict_proba(X[held].astype(np.float64))
        assert fit.validation is not None
        # Cosines of rows 1,000 away from the origin differ by less than float32 resolves:
        # neighbours may swap.
        loose = offset > 0 and fit.spec.metric == "cosine"
        if loose:
            assert np.abs(fit.validation - expected).mean() < 0.05
        else:
            np.testing.assert_allclose(fit.validation, expected, atol=1e-3)


def test_the_full_head_predicts_from_its_rows() -> None:
    """The head of all rows is its rows: it predicts new ones like scikit-learn, and shares the
    arrays with all specs.
    """
    X, y, fold = digits()
    fold[400:] = TEST
    fits = [fit for fit in fit_knn_bank(TrainingData(X, y, fold, 10), SPECS) if fit.fold == REFIT]
    assert all(fit.arrays["features"] is fits[0].arrays["features"] for fit in fits)
    assert len(fits[0].arrays["features"]) == 400
    for fit in fits:
        assert isinstance(fit.spec, KNNSpec)
        model = KNeighborsClassifier(
            fit.spec.k, metric=fit.spec.metric, weights=fit.spec.weighting, algorithm="brute"
        )
        expected = model.fit(X[:400], y[:400]).predict_proba(X[400:])
        np.testing.assert_allclose(predict_head(fit.spec, fit.arrays, X[400:]), expected, atol=1e-3)


def test_regression_and_labels_average_their_neighbours() -> None:
    """Regression equals KNeighborsRegressor; labels are shares of neighbours."""
    X, y, fold = digits()
    target = np.stack([y * 3.0, np.sqrt(y)], axis=1)
    spec = KNNSpec(7, "euclidean", "distance")
    fit = fit_knn_bank(
        TrainingData(X, target, fold, 2, task_kind="regression"), [spec], refit=False
    )[0]
    model = KNeighborsRegressor(7, weights="distance", algorithm="brute").fit(
        X[fold != 0], target[fold != 0]
    )
    np.testing.assert_allclose(fit.validation, model.predict(X[fold == 0]), rtol=1e-3)
    labels = np.stack([y > 4, y % 2 == 0], axis=1).astype(np.uint8)
    shares = fit_knn_bank(
        TrainingData(X, labels, fold, 2, task_kind="multi"), [KNNSpec(5)], refit=False
    )[0].validation
    assert shares is not None
    np.testing.assert_allclose(shares * 5, np.round(shares * 5), atol=1e-5)
    assert score("multi", labels[fold == 0], shares, "hamming_accuracy") > 0.9


def test_equal_rows_have_distance_zero_and_decide_alone() -> None:
    """A training row's twin takes its label whatever k is, in both metrics, far from the origin and
    of any scale.
    """
    generator = np.random.default_rng(0)
    for scale in (1e-8, 1.0, 1e8):
        rows = ((generator.normal(size=(60, 30)) + 50) * scale).astype(np.float32)
        X, y = np.concatenate([rows, rows]), np.concatenate([np.arange(60) % 3] * 2)
        fold = np.repeat([0, 1], 60).astype(np.int16)
        specs = [KNNSpec(9, metric, "distance") for metric in ("cosine", "euclidean")]  # type: ignore[arg-type]
        for fit in fit_knn_bank(TrainingData(X, y, fold, 3), specs, refit=False):
            assert fit.validation is not None
            np.testing.assert_array_equal(fit.validation, np.eye(3, dtype=np.float32)[y[:60]])


def test_weights_and_impossible_k() -> None:
    """A weight is a number of votes, zero none; k above the training rows is that head's error and
    no one else's.
    """
    X = np.array([[0.0], [1.0], [2.0], [0.1]], np.float32)
    y, fold = np.array([0, 1, 1, 0]), np.array([-2, -2, -2, 0], np.int16)
    weight = np.array([5.0, 1.0, 0.0, 1.0])
    near, far = fit_knn_bank(
        TrainingData(X, y, fold, 2, sample_weight=weight),
        [KNNSpec(2, "euclidean"), KNNSpec(3)],
        refit=False,
    )
    np.testing.assert_allclose(near.validation, [[5 / 6, 1 / 6]], rtol=1e-6)
    assert far.error is not None
    assert "between 1 and 2" in far.error


def test_a_row_of_zeros_has_cosine_zero_with_everything() -> None:
    """Its distance is 1, not NaN."""
    X = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]], np.float32)
    fold = np.array([0, -2, -2, -2], np.int16)
    (fit,) = fit_knn_bank(
        TrainingData(X, np.array([0, 0, 1, 1]), fold, 2), [KNNSpec(3)], refit=False
    )
    np.testing.assert_allclose(fit.validation, [[1 / 3, 2 / 3]], rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(4, 30), width=st.integers(1, 6), k=st.integers(1, 30), seed=st.integers(0, 99)
)
def test_any_shape_gives_shares(rows: int, width: int, k: int, seed: int) -> None:
    """Rows of shares sum to one, with duplicated rows, constant features and more neighbours than
    rows.
    """
    generator = np.random.default_rng(seed)
    X = np.round(generator.normal(size=(rows, width))).astype(np.float32)
    y = generator.integers(0, 3, rows)
    specs = [KNNSpec(k, metric, "distance") for metric in ("cosine", "euclidean")]  # type: ignore[arg-type]
    for fit in fit_knn_bank(TrainingData(X, y, make_folds(y, n_folds=2, seed=seed), 3), specs):
        if fit.validation is not None:
            np.testing.assert_allclose(fit.validation.sum(1), 1, rtol=1e-5)
        else:
            assert fit.fold == REFIT or fit.error is not None


def test_class_means_equal_scikit_learns_nearest_centroid() -> None:
    """The nearest mean of standardized rows, per fold from differences of one sum, and
    of all rows.
    """
    X, y, fold = digits()
    specs = [CentroidSpec("euclidean"), CentroidSpec("cosine")]
    fits = fit_centroid_bank(TrainingData(X, y, fold, 10), specs)
    for fit in fits:
        train = fold != fit.fold
        held = ~train if fit.fold != REFIT else train
        mean, scale = X[train].mean(0), X[train].std(0)
        rows = (X - mean) / scale
        if fit.spec == specs[0]:
            expected = NearestCentroid().fit(rows[train], y[train]).predict(rows[held])
        else:
            means = np.stack([(X[train] - mean)[y[train] == c].mean(0) for c in range(10)])
            cosine = (X[held] - mean) @ means.T / np.linalg.norm(means, axis=1)
            expected = cosine.argmax(1)
        predicted = predict_head(fit.spec, fit.arrays, X[held])
        np.testing.assert_array_equal(predicted.argmax(1), expected)
        if fit.validation is not None:
            np.testing.assert_array_equal(fit.validation, predicted)


def test_a_class_missing_from_a_fold_has_probability_zero() -> None:
    """Classes without training rows are never predicted; regression is refused as a row."""
    X, y, _ = digits(100)
    fold = np.where(y == 3, 0, 1).astype(np.int16)
    without = fit_centroid_bank(TrainingData(X, y, fold, 10), [CentroidSpec()], refit=False)[0]
    assert without.validation is not None
    assert (without.validation[:, 3] == 0).all()
    (refused,) = fit_centroid_bank(
        TrainingData(X, y[:, None] * 1.0, np.zeros(100, np.int16), 1, task_kind="regression"),
        [CentroidSpec()],
        refit=False,
    )
    assert "one class per row" in (refused.error or "")
