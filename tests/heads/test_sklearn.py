"""Any scikit-learn estimator as a head: what it predicts, what it stores, how it fails."""

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from headrace.heads.data.folds import make_folds
from headrace.heads.data.task import REFIT
from headrace.heads.data.training_data import TrainingData
from headrace.heads.errors import HeadError
from headrace.heads.predict import predict_head
from headrace.heads.sklearn.bank import (
    BadEstimator,
    fit_sklearn_bank,
    fitted_sklearn,
    make_estimator,
)
from headrace.heads.sklearn.kind import SklearnSpec

Arrays = np.ndarray[Any, Any]


def digits(rows: int = 300) -> tuple[Arrays, Arrays, Arrays]:
    X, y = load_digits(return_X_y=True)
    return X[:rows].astype(np.float32), y[:rows], make_folds(y[:rows], n_folds=3, seed=0)


def test_a_head_is_the_estimator_fitted_on_the_other_folds() -> None:
    """Predictions of every fold are those of the estimator itself, standardized on its training
    rows where asked.
    """
    X, y, fold = digits()
    forest = SklearnSpec("sklearn.ensemble.RandomForestClassifier", '{"n_estimators": 10}')
    machine = SklearnSpec("sklearn.svm.SVC", '{"C": 3.0}', standardize=True)
    for fit in fit_sklearn_bank(TrainingData(X, y, fold, 10), [forest, machine], refit=False):
        train, held = fold != fit.fold, fold == fit.fold
        assert fit.validation is not None
        if fit.spec == forest:
            model = RandomForestClassifier(10, random_state=0).fit(X[train], y[train])
            np.testing.assert_allclose(fit.validation, model.predict_proba(X[held]), atol=1e-6)
        else:
            scaler = StandardScaler().fit(X[train])
            model = SVC(C=3.0).fit(scaler.transform(X[train]), y[train])
            expected = model.decision_function(scaler.transform(X[held])).argmax(1)
            np.testing.assert_array_equal(fit.validation.argmax(1), expected)
            np.testing.assert_allclose(fit.validation.sum(1), 1, rtol=1e-5)


def test_the_stored_rows_make_the_estimator_again() -> None:
    """The head of all rows predicts from its arrays what the estimator fitted on all rows predicts,
    every time.
    """
    X, y, fold = digits()
    spec = SklearnSpec("sklearn.ensemble.ExtraTreesClassifier", '{"n_estimators": 10}')
    full = next(
        fit for fit in fit_sklearn_bank(TrainingData(X, y, fold, 10), [spec]) if fit.fold == REFIT
    )
    expected = make_estimator(spec).fit(X, y).predict_proba(X + 1)
    for _ in range(2):
        np.testing.assert_allclose(predict_head(spec, full.arrays, X + 1), expected, atol=1e-6)
    without = {name: array for name, array in full.arrays.items() if name != "features"}
    with pytest.raises(HeadError, match="a sklearn head, which has one called features"):
        predict_head(spec, without, X)
    with pytest.raises(HeadError, match="not stored"):
        fitted_sklearn(spec, without, "single")


def test_classes_labels_and_values() -> None:
    """A class missing from training has probability 0; estimators without probabilities, labels and
    regression work.
    """
    X, y, _ = digits()
    fold = np.where(y == 3, 0, 1 + np.arange(len(y)) % 2).astype(np.int16)
    specs = [
        SklearnSpec("sklearn.naive_bayes.GaussianNB"),
        SklearnSpec("sklearn.neighbors.NearestCentroid"),
        SklearnSpec("sklearn.linear_model.RidgeClassifier"),
    ]
    for fit in fit_sklearn_bank(TrainingData(X, y, fold, 10), specs, refit=False):
        assert fit.validation is not None
        assert fit.validation.shape == ((fold == fit.fold).sum(), 10)
        if fit.fold == 0:
            assert (fit.validation[:, 3] == 0).all()
    labels = np.stack([y > 4, y % 2 == 0, np.zeros(len(y))], axis=1).astype(np.uint8)
    tree = SklearnSpec("sklearn.tree.DecisionTreeClassifier")
    chain = SklearnSpec("sklearn.neighbors.KNeighborsClassifier")
    folds = make_folds(y, n_folds=3, seed=0)
    for fit in fit_sklearn_bank(
        TrainingData(X, labels, folds, 3, task_kind="multi"), [tree, chain], refit=False
    ):
        assert fit.validation is not None
        assert (fit.validation[:, 2] == 0).all()  # a label that never occurs
        assert ((fit.validation[:, 0] > 0.5) == (y[folds == fit.fold] > 4)).mean() > 0.75
    values = (y * 10.0)[:, None]
    ridge = SklearnSpec("sklearn.linear_model.Ridge")
    fit = fit_sklearn_bank(
        TrainingData(X, values, folds, 1, task_kind="regression"), [ridge], refit=False
    )[0]
    expected = Ridge().fit(X[folds != 0], values[folds != 0, 0]).predict(X[folds == 0])
    assert fit.validation is not None
    np.testing.assert_allclose(fit.validation[:, 0], expected, rtol=1e-4, atol=1e-3)


def test_weights_reach_the_estimator_or_are_refused() -> None:
    """Sample weights change a tree; an estimator that takes none fails with that reason, and only
    then.
    """
    X, y, fold = digits()
    weight = np.where(y == 0, 100.0, 1.0)
    tree = SklearnSpec("sklearn.tree.DecisionTreeClassifier", '{"max_depth": 2}')
    plain = fit_sklearn_bank(TrainingData(X, y, fold, 10), [tree], refit=False)[0]
    heavy = fit_sklearn_bank(
        TrainingData(X, y, fold, 10, sample_weight=weight), [tree], refit=False
    )[0]
    assert plain.validation is not None
    assert heavy.validation is not None
    assert np.abs(plain.validation - heavy.validation).max() > 0.1
    neighbours = SklearnSpec("sklearn.neighbors.KNeighborsClassifier", standardize=True)
    refused = fit_sklearn_bank(
        TrainingData(X, y, fold, 10, sample_weight=weight), [neighbours], refit=False
    )[0]
    assert "takes no sample weights" in (refused.error or "")
    even = fit_sklearn_bank(
        TrainingData(X, y, fold, 10, sample_weight=weight * 0 + 2), [neighbours], refit=False
    )[0]
    assert even.error is None


def test_what_is_no_estimator_says_so() -> None:
    """A wrong module, a wrong name, a function, a wrong parameter, text that is no JSON: each its
    own message.
    """
    for path, parameters, message in [
        ("sklearn.nothing.Here", "{}", "cannot be imported"),
        ("RandomForestClassifier", "{}", "full path"),
        ("sklearn.datasets.load_digits", "{}", "not a scikit-learn estimator"),
        ("os.path", "{}", "not a scikit-learn estimator"),
        ("sklearn.svm.SVC", '{"depth": 3}', "it takes C, kernel"),
        ("sklearn.svm.SVC", "C=3", "does not take"),
    ]:
        with pytest.raises(BadEstimator, match=message):
            make_estimator(SklearnSpec(path, parameters))
    assert make_estimator(SklearnSpec("sklearn.svm.SVC", '{"random_state": 7}')).random_state == 7
