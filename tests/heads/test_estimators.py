"""scikit-learn's own conformance checks on every face, and the faces against the banks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import RegressorMixin, clone
from sklearn.datasets import load_digits, make_classification, make_regression
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from headrace.heads.estimators import (
    CentroidHead,
    KNNHead,
    LogisticHead,
    MLPHead,
    MLPRegressionHead,
    RidgeHead,
    RidgeRegressionHead,
)
from headrace.heads.predict import predict_head

# A network of a few units, so that the many small fits of the checks are quick.
FACES = [
    LogisticHead(),
    RidgeHead(),
    MLPHead(hidden=(16,), epochs=30, learning_rate=0.02, batch_size=32),
    KNNHead(metric="euclidean"),
    CentroidHead(metric="euclidean"),
    RidgeRegressionHead(),
    MLPRegressionHead(hidden=(16,), epochs=60, learning_rate=0.03, batch_size=32),
]


def exceptions(estimator: Any) -> dict[str, str]:
    """What scikit-learn asks of weights that these cannot give, and why.

    Rows of weight 0 are left out by all of them.
    """
    scaled = (
        "features are standardized by the rows, not by their weights, as in a pipeline with a "
        "StandardScaler"
    )
    reasons = {
        "LogisticHead": scaled,
        "RidgeHead": scaled,
        "RidgeRegressionHead": scaled,
        "MLPHead": "minibatches are drawn of rows, whatever their weights",
        "MLPRegressionHead": "minibatches are drawn of rows, whatever their weights",
        "KNNHead": "a row of weight two is one neighbour with two votes, not two neighbours",
    }
    reason = reasons.get(type(estimator).__name__)
    return {} if reason is None else {"check_sample_weight_equivalence_on_dense_data": reason}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small are ten times slower with two threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@parametrize_with_checks(FACES, expected_failed_checks=exceptions)
def test_scikit_learn_conformance(estimator: Any, check: Any) -> None:
    """Every face keeps scikit-learn's estimator contract."""
    check(estimator)


def test_faces_predict_like_their_arrays() -> None:
    """A face is its bank's head:

    `predict_head` on its arrays gives the same probabilities, and it learns.
    """
    X, y = load_digits(return_X_y=True)
    for face in (
        LogisticHead(C=0.1),
        RidgeHead(),
        MLPHead(hidden=(32,), epochs=10, learning_rate=0.01),
        KNNHead(),
        CentroidHead(),
    ):
        face.fit(X[:1000], y[:1000])
        np.testing.assert_array_equal(
            face.predict_proba(X[1000:]), predict_head(face.spec_, face.arrays_, X[1000:])
        )
        assert face.score(X[1000:], y[1000:]) > 0.8


def test_validation_fraction_chooses_the_epochs() -> None:
    """With held-out rows an overfitting network stops before its last epoch, and is then trained on
    all rows.
    """
    generator = np.random.default_rng(0)
    X, y = generator.normal(size=(120, 40)), generator.integers(0, 2, 120)
    free = MLPHead(hidden=(32,), epochs=60, learning_rate=0.01, batch_size=32).fit(X, y)
    chosen = MLPHead(
        hidden=(32,), epochs=60, learning_rate=0.01, batch_size=32, validation_fraction=0.25
    ).fit(X, y)
    assert free.n_iter_ == 60
    assert chosen.n_iter_ < 30


def test_parameters_that_cannot_train_are_refused() -> None:
    """An impossible parameter is a ValueError that says what is wrong, at fit and not in the
    constructor.
    """
    X, y = load_digits(return_X_y=True)
    with pytest.raises(ValueError, match=r"dropout 1\.5"):
        MLPHead(dropout=1.5).fit(X[:100], y[:100])
    with pytest.raises(ValueError, match="at least 2 classes"):
        CentroidHead().fit(X[:100], np.zeros(100))


@pytest.mark.parametrize("C", [1e-12, 1e-4, 1.0, 1e10])
def test_a_face_predicts_what_scikit_learn_predicts(C: float) -> None:
    """At any strength, two rows or many, duplicated and constant columns, labels of any kind: the
    same probabilities.
    """
    random = np.random.default_rng(0)
    X = random.standard_normal((60, 6))
    cases = [
        (X[:2], np.array(["ä", "猫"])),
        (np.hstack([X, X, 0 * X[:, :1]]), np.array([10, -5, 10**12])[random.integers(0, 3, 60)]),
        ((X * 5).astype(int)[::-1, ::2], X[:, 1] > 0.3),
    ]
    for rows, labels in cases:
        wide = np.asarray(rows, np.float64)
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=C, tol=1e-9, max_iter=10_000)
        ).fit(wide, labels)
        head = LogisticHead(C).fit(rows, labels)
        np.testing.assert_allclose(head.predict_proba(rows), model.predict_proba(wide), atol=1e-3)
        assert head.gap_ >= 0


def test_weights_are_what_they_are_in_scikit_learn() -> None:
    """With weights a face predicts what scikit-learn's weighted estimator predicts behind an
    unweighted scaler.
    """
    random = np.random.default_rng(0)
    X = random.standard_normal((120, 6))
    y = (X[:, 0] + random.standard_normal(120) > 0).astype(int)
    weight = random.integers(0, 4, 120).astype(float)
    kept = weight > 0
    scaler = StandardScaler().fit(X[kept])
    Z = scaler.transform(X)
    logistic = LogisticRegression(C=0.3, tol=1e-9, max_iter=10_000).fit(
        Z[kept], y[kept], weight[kept]
    )
    head = LogisticHead(0.3).fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(head.predict_proba(X), logistic.predict_proba(Z), atol=1e-3)
    values = np.stack([X[:, 1] * 3 + 1, X[:, 2]], 1) + random.standard_normal((120, 2))
    ridge = Ridge(alpha=2.0).fit(Z[kept], values[kept], weight[kept])
    faces = RidgeRegressionHead(2.0).fit(X, values, sample_weight=weight)
    np.testing.assert_allclose(faces.predict(X), ridge.predict(Z), atol=1e-5)
    one = RidgeRegressionHead(2.0).fit(X, values[:, 0], sample_weight=weight).predict(X)
    np.testing.assert_allclose(one, faces.predict(X)[:, 0], atol=1e-6)


@pytest.mark.parametrize("face", FACES, ids=lambda face: type(face).__name__)
def test_weight_zero_leaves_a_row_out_and_weights_matter(face: Any) -> None:
    """Rows of weight 0 are as if they were not there; a heavy class or number draws predictions to
    itself.
    """
    random = np.random.default_rng(1)
    X = random.standard_normal((90, 4))
    numbers = isinstance(face, RegressorMixin)
    y = (
        X[:, 0] + random.standard_normal(90)
        if numbers
        else (X[:, 0] + random.standard_normal(90) > 0).astype(int)
    )
    weight = np.where(np.arange(90) % 3 == 0, 0.0, 1.0)

    def predicted(*given: Any) -> Any:
        fitted = clone(face).fit(*given)
        return fitted.predict(X) if numbers else fitted.predict_proba(X)[:, 1]

    np.testing.assert_allclose(
        predicted(X, y, weight), predicted(X[weight > 0], y[weight > 0]), atol=1e-6
    )
    if not isinstance(face, CentroidHead):  # means of the classes, each by itself
        heavy = np.where(y > 0.5, 20.0, 1.0)
        assert predicted(X, y, heavy).mean() > predicted(X, y).mean()
    with pytest.raises(ValueError, match="one weight for each row"):
        clone(face).fit(X, y, weight[:-1])
    with pytest.raises(ValueError, match="no row is left"):
        clone(face).fit(X, y, np.zeros(90))


def test_a_network_learns_numbers() -> None:
    """The regression network follows a curve that no line can, one target or two, and stops early
    where it is told to.
    """
    random = np.random.default_rng(0)
    X = random.uniform(-2, 2, (400, 2))
    y = np.stack([np.abs(X[:, 0]) * 100 + 7, X[:, 1] ** 2], 1)
    face = MLPRegressionHead(
        (32,), epochs=80, learning_rate=0.02, batch_size=64, validation_fraction=0.2
    ).fit(X, y)
    assert face.predict(X).shape == (400, 2)
    assert face.score(X, y) > 0.95
    assert RidgeRegressionHead().fit(X, y).score(X, y) < 0.3


@pytest.mark.parametrize("n_classes", [2, 4])
def test_linear_classifiers_have_coefficients_as_in_scikit_learn(n_classes):
    """Shapes and values of coef_, intercept_ and decision_function."""
    X, y = make_classification(
        200, 6, n_informative=5, n_redundant=0, n_classes=n_classes, random_state=0
    )
    for head, reference, tolerance in (
        (LogisticHead(0.3, standardize=False), LogisticRegression(C=0.3, tol=1e-10), 1e-3),
        (RidgeHead(2.0, standardize=False), RidgeClassifier(alpha=2.0), 1e-4),
    ):
        head.fit(X, y)
        reference.fit(X, y)
        assert head.coef_.shape == np.atleast_2d(reference.coef_).shape
        assert head.intercept_.shape == np.atleast_1d(reference.intercept_).shape
        # softmax has one free constant per feature: what decides is the difference of the classes
        theirs, ours = reference.decision_function(X), head.decision_function(X)
        assert ours.shape == theirs.shape
        if n_classes > 2 and isinstance(head, LogisticHead):
            theirs, ours = (each - each.mean(1, keepdims=True) for each in (theirs, ours))
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())
        np.testing.assert_array_equal(
            head.classes_[(ours > 0).astype(int) if n_classes == 2 else ours.argmax(1)],
            head.predict(X),
        )


def test_ridge_regression_has_coefficients_as_in_scikit_learn():
    """For one target and for several."""
    X, y = make_regression(120, 5, n_targets=2, random_state=0)
    for target in (y, y[:, 0]):
        head = RidgeRegressionHead(3.0, standardize=False).fit(X, target)
        reference = Ridge(alpha=3.0).fit(X, target)
        np.testing.assert_allclose(head.coef_, reference.coef_, rtol=1e-4)
        np.testing.assert_allclose(head.intercept_, reference.intercept_, rtol=1e-3, atol=1e-4)
