"""scikit-learn's own conformance checks on every face, and the faces against the banks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from headrace.heads import CentroidHead, KNNHead, LogisticHead, MLPHead, RidgeHead, predict_head

# A network of a few units, so that the many small fits of the checks are quick.
FACES = [
    LogisticHead(),
    RidgeHead(),
    MLPHead(hidden=(16,), epochs=30, learning_rate=0.02, batch_size=32),
    KNNHead(metric="euclidean"),
    CentroidHead(metric="euclidean"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small are ten times slower with two threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@parametrize_with_checks(FACES)
def test_scikit_learn_conformance(estimator: Any, check: Any) -> None:
    """Every face keeps scikit-learn's estimator contract."""
    check(estimator)


def test_faces_predict_like_their_arrays() -> None:
    """A face is its bank's head: `predict_head` on its arrays gives the same probabilities, and it learns."""
    X, y = load_digits(return_X_y=True)
    for face in (
        LogisticHead(C=0.1),
        RidgeHead(),
        MLPHead(hidden=(32,), epochs=10, learning_rate=0.01),
        KNNHead(),
        CentroidHead(),
    ):
        face.fit(X[:1000], y[:1000])
        np.testing.assert_array_equal(face.predict_proba(X[1000:]), predict_head(face.spec_, face.arrays_, X[1000:]))
        assert face.score(X[1000:], y[1000:]) > 0.8


def test_validation_fraction_chooses_the_epochs() -> None:
    """With held-out rows an overfitting network stops before its last epoch, and is then trained on all rows."""
    generator = np.random.default_rng(0)
    X, y = generator.normal(size=(120, 40)), generator.integers(0, 2, 120)
    free = MLPHead(hidden=(32,), epochs=60, learning_rate=0.01, batch_size=32).fit(X, y)
    chosen = MLPHead(hidden=(32,), epochs=60, learning_rate=0.01, batch_size=32, validation_fraction=0.25).fit(X, y)
    assert free.n_iter_ == 60
    assert chosen.n_iter_ < 30


def test_parameters_that_cannot_train_are_refused() -> None:
    """An impossible parameter is a ValueError that says what is wrong, at fit and not in the constructor."""
    X, y = load_digits(return_X_y=True)
    with pytest.raises(ValueError, match=r"dropout 1\.5"):
        MLPHead(dropout=1.5).fit(X[:100], y[:100])
    with pytest.raises(ValueError, match="at least 2 classes"):
        CentroidHead().fit(X[:100], np.zeros(100))


@pytest.mark.parametrize("C", [1e-12, 1e-4, 1.0, 1e10])
def test_a_face_predicts_what_scikit_learn_predicts(C: float) -> None:
    """At any strength, two rows or many, duplicated and constant columns, labels of any kind: the same probabilities."""
    random = np.random.default_rng(0)
    X = random.standard_normal((60, 6))
    cases = [
        (X[:2], np.array(["ä", "猫"])),
        (np.hstack([X, X, 0 * X[:, :1]]), np.array([10, -5, 10**12])[random.integers(0, 3, 60)]),
        ((X * 5).astype(int)[::-1, ::2], X[:, 1] > 0.3),
    ]
    for rows, labels in cases:
        wide = np.asarray(rows, np.float64)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-9, max_iter=10_000)).fit(wide, labels)
        head = LogisticHead(C).fit(rows, labels)
        np.testing.assert_allclose(head.predict_proba(rows), model.predict_proba(wide), atol=1e-3)
        assert head.gap_ >= 0
