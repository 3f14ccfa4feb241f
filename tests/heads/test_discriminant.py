"""Linear discriminant banks against scikit-learn, one head at a time."""

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from scipy.special import softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from headrace.heads.bank import fit_bank
from headrace.heads.data.fold_coordinates import fold_moments
from headrace.heads.data.task import REFIT, Task
from headrace.heads.data.training_data import TrainingData
from headrace.heads.discriminant.bank import DiscriminantProblem, fit_discriminant_bank
from headrace.heads.discriminant.kind import LDASpec
from headrace.heads.errors import HeadError
from headrace.heads.kinds import spec_from_json
from headrace.heads.predict import predict_head
from headrace.heads.spec import spec_to_json

SHRINKAGES = (0.05, 0.3, 0.9, 1.0)


def blobs(n_rows: int, n_features: int, n_classes: int, seed: int) -> tuple:
    """Correlated features of very different scales, around class means."""
    rng = np.random.default_rng(seed)
    target = np.arange(n_rows) % n_classes
    mixing = rng.normal(size=(n_features, n_features)) / np.sqrt(n_features)
    noise = rng.normal(size=(n_rows, n_features)) @ (mixing + np.eye(n_features))
    X = rng.normal(size=(n_classes, n_features))[target] + noise
    X = X * 10.0 ** rng.integers(-3, 4, n_features) + rng.normal(size=n_features)
    order = rng.permutation(n_rows)
    return X[order], target[order], (np.arange(n_rows) % 3).astype(np.int16)


def reference(X: np.ndarray, y: np.ndarray, shrinkage: float, *, standardize: bool = True):
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    return (make_pipeline(StandardScaler(), lda) if standardize else lda).fit(X, y)


@settings(deadline=None, max_examples=20)
@given(
    n_rows=st.integers(30, 90),
    n_features=st.integers(1, 60),
    n_classes=st.integers(2, 5),
    standardize=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_every_shrinkage_and_fold_equals_scikit_learn(
    n_rows, n_features, n_classes, standardize, seed
):
    """Probabilities of all rows, with more rows than features and fewer: to seven digits in float64,
    and as the float32 arrays that are stored predict them.
    """
    X, y, fold = blobs(n_rows, n_features, n_classes, seed)
    # scikit-learn warns of a class of one row, and knows nothing of one that a fold lacks
    class_counts = [np.bincount(y[fold != held_out], minlength=n_classes) for held_out in set(fold)]
    assume(np.min(class_counts) >= 2)
    data = TrainingData(X, y, fold, n_classes)
    problem = DiscriminantProblem(data, fold_moments(data))
    specs = [LDASpec(s, standardize=standardize) for s in SHRINKAGES]
    for fit in fit_discriminant_bank(data, specs):
        train = fold != fit.fold
        head = reference(X[train], y[train], fit.spec.shrinkage, standardize=standardize)
        expected = head.predict_proba(X)
        scatter = problem.scatter(fit.fold, standardize=standardize)
        weight, bias = scatter.coefficients(fit.spec.shrinkage)
        np.testing.assert_allclose(softmax(X @ weight.T + bias, axis=1), expected, atol=1e-7)
        stored = predict_head(fit.spec, fit.arrays, X)
        np.testing.assert_allclose(stored, expected, atol=1e-2)
        if fit.fold != REFIT:
            # one product of all rows and one of the held-out rows round otherwise; decisions may be 1e3
            np.testing.assert_allclose(fit.validation, stored[~train], rtol=1e-5, atol=1e-4)


def test_no_shrinkage_and_the_eigen_solver():
    """Without shrinkage the plain discriminant; scikit-learn's other solver gives the same."""
    X, y, fold = blobs(200, 6, 3, seed=1)
    for shrinkage in (0.0, 0.4):
        data = TrainingData(X, y, fold, 3)
        scatter = DiscriminantProblem(data, fold_moments(data)).scatter(REFIT, standardize=True)
        weight, bias = scatter.coefficients(shrinkage)
        lda = LinearDiscriminantAnalysis(solver="eigen", shrinkage=shrinkage)
        expected = make_pipeline(StandardScaler(), lda).fit(X, y).predict_proba(X)
        np.testing.assert_allclose(softmax(X @ weight.T + bias, axis=1), expected, atol=1e-7)


@pytest.mark.parametrize("n_features", [4, 80])
def test_whole_weights_are_repeated_rows(n_features):
    """A row of weight 2 counts in priors, means and covariance as two rows, of weight 0 as none."""
    X, y, _ = blobs(60, n_features, 3, seed=2)
    weight = np.arange(60) % 3.0
    fold = np.full(60, -2, np.int16)
    spec = LDASpec(0.2, standardize=False)
    X = X / X.std(0)
    (weighted,) = fit_discriminant_bank(TrainingData(X, y, fold, 3, sample_weight=weight), [spec])
    repeated = np.repeat(np.arange(60), weight.astype(int))
    expected = reference(X[repeated], y[repeated], 0.2, standardize=False).predict_proba(X)
    np.testing.assert_allclose(predict_head(spec, weighted.arrays, X), expected, atol=2e-4)


@pytest.mark.parametrize("n_features", [5, 80])
def test_constant_features_and_absent_classes(n_features):
    """A constant feature has no weight; a class that a fold does not train has probability 0."""
    X, y, fold = blobs(60, n_features, 3, seed=3)
    X[:, 0] = 7.0
    fold[y == 2] = 0
    for fit in fit_discriminant_bank(TrainingData(X, y, fold, 3), [LDASpec(0.1)]):
        assert np.isfinite(fit.arrays["weight"]).all()
        np.testing.assert_array_equal(fit.arrays["weight"][:, 0], 0)
        if fit.fold == 0:
            assert (fit.validation[:, 2] == 0).all()


def test_in_a_bank_and_as_json():
    """The kind trains by its name, its spec survives JSON, and it refuses what it cannot do."""
    X, y, fold = blobs(60, 5, 2, seed=4)
    spec = LDASpec(0.5)
    assert spec_from_json(spec_to_json(spec)) == spec
    names = np.array([str(i) for i in range(60)])
    content = np.array([f"{i:032x}" for i in range(60)], "S32")
    task = Task("single", ("a", "b"), names, content, y, fold, np.ones(60))
    fits = fit_bank(np.stack([X, X]).astype(np.float32), task, [spec])  # two views
    assert [fit.fold for fit in fits] == [0, 1, 2, REFIT]
    assert all(fit.error is None for fit in fits)
    assert len(fits[0].validation) == 20
    several = Task(
        "multi", ("a", "b"), names, content, np.eye(2, dtype=np.uint8)[y], fold, np.ones(60)
    )
    with pytest.raises(HeadError, match="lda heads have no use for a multi task"):
        fit_bank(X, several, [spec])
    with pytest.raises(ValueError, match=r"0\.\.1"):
        fit_discriminant_bank(TrainingData(X, y, fold, 2), [LDASpec(1.5)])
