"""The Gaussian support vector machine: scikit-learn's own, faster on wide features."""

import json
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from headrace.heads.data.folds import make_folds
from headrace.heads.data.training_data import TrainingData
from headrace.heads.evaluate.metrics import score
from headrace.heads.linear.rbf import RBFClassifier
from headrace.heads.sklearn.bank import fit_sklearn_bank
from headrace.heads.sklearn.kind import SklearnSpec

# What scikit-learn's own SVC is excused from, too.
EXCUSED = {
    "check_sample_weight_equivalence_on_dense_data": "libsvm's weights scale C, they do not repeat rows"
}


@parametrize_with_checks([RBFClassifier()], expected_failed_checks=lambda _: EXCUSED)
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    """It is an estimator as any other."""
    check(estimator)


def test_it_is_scikit_learns_machine() -> None:
    """The same decisions as SVC's with gamma divided by the number of features, two classes and
    ten, with weights.
    """
    X, y = load_digits(return_X_y=True)
    X, y = X[:300] / 16, y[:300]
    weight = np.random.default_rng(0).uniform(0.5, 1.5, 200)
    for target in (y, y % 2):
        ours = RBFClassifier(C=3.0, gamma=5.0).fit(X[:200], target[:200], weight)
        theirs = SVC(C=3.0, gamma=5.0 / 64).fit(X[:200], target[:200], weight)
        np.testing.assert_allclose(
            ours.decision_function(X[200:]), theirs.decision_function(X[200:]), atol=1e-4
        )
        assert (ours.predict(X[200:]) == theirs.predict(X[200:])).all()


def test_it_is_a_head_by_its_import_path() -> None:
    """A recipe's `heads.sklearn` takes it; better than a coin on digits."""
    X, y = load_digits(return_X_y=True)
    X, y = X[:200], y[:200] % 2
    spec = SklearnSpec(
        "headrace.heads.linear.rbf.RBFClassifier", json.dumps({"C": 10}), standardize=True
    )
    fold = make_folds(y, n_folds=2, seed=0)
    fits = fit_sklearn_bank(TrainingData(X, y, fold, 2), [spec])
    assert [fit.error for fit in fits] == [None] * 3
    assert fits[0].validation is not None
    assert score("single", y[fold == 0], fits[0].validation, "accuracy") > 0.9
