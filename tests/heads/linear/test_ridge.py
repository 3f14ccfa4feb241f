"""Ridge banks: every head equals scikit-learn's closed form to 1e-6, whatever the shape, the
weights and the strengths.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from headrace.cache.errors import HeadraceError
from headrace.heads.data.task import REFIT, TRAIN_ONLY
from headrace.heads.data.training_data import TrainingData
from headrace.heads.linear.kind import RidgeSpec
from headrace.heads.linear.ridge import MIN_STRENGTHS_FOR_EIGENVALUES, fit_ridge_bank
from headrace.heads.predict import predict_head

SLOWLY = settings(
    deadline=None, max_examples=25, suppress_health_check=list(HealthCheck), derandomize=True
)
FEW, MANY = 2, MIN_STRENGTHS_FOR_EIGENVALUES + 1


def blobs(n, d, classes, seed):
    """Overlapping classes, features of many scales and offsets, float32."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    X = rng.standard_normal((n, d)) + rng.standard_normal((classes, d))[y]
    return (X * 10 ** rng.uniform(-2, 2, d) + rng.standard_normal(d)).astype(np.float32), y.astype(
        np.int64
    )


def folds(n, k, seed=0):
    return np.random.default_rng(seed).permutation(np.arange(n) % k).astype(np.int16)


def strengths(count):
    return np.logspace(-2, 3, count).tolist()


@SLOWLY
@given(
    n=st.integers(30, 150),
    d=st.integers(1, 120),
    classes=st.integers(2, 5),
    seed=st.integers(0, 10_000),
    class_weight=st.sampled_from(["none", "balanced"]),
    standardize=st.booleans(),
    weighted=st.booleans(),
    count=st.sampled_from([FEW, MANY]),
)
def test_equals_ridge_classifier(n, d, classes, seed, class_weight, standardize, weighted, count):
    """Coefficients, intercepts and scores are RidgeClassifier's to 1e-6, for D above and below N
    and both factorizations.
    """
    X, y = blobs(n, d, classes, seed)
    fold = folds(n, 3, seed)
    sw = np.random.default_rng(seed).uniform(0.2, 3, n) if weighted else None
    specs = [RidgeSpec(alpha, class_weight, standardize) for alpha in strengths(count)]
    for fit in fit_ridge_bank(TrainingData(X, y, fold, classes, sample_weight=sw), specs)[
        :: count // 2
    ]:
        train = fold != fit.fold
        if len(np.unique(y[train])) < classes:
            continue
        scaler = StandardScaler(with_std=standardize).fit(X[train].astype(np.float64))
        model = RidgeClassifier(
            fit.spec.alpha, class_weight=None if class_weight == "none" else "balanced"
        )
        model.fit(
            scaler.transform(X[train].astype(np.float64)),
            y[train],
            None if sw is None else sw[train],
        )
        own = fit.arrays["weight"] if classes > 2 else fit.arrays["weight"][1:]
        theirs = model.coef_ / (scaler.scale_ if standardize else 1.0)
        assert np.abs(own - theirs).max() <= 1e-6 * np.abs(theirs).max()
        assert 0 <= fit.gap < 1e-9
        if fit.fold != REFIT:
            decision = model.decision_function(scaler.transform(X[~train].astype(np.float64)))
            decision = decision.reshape(len(decision), -1)
            if classes == 2:
                decision = np.hstack([-decision, decision])
            p = np.exp(2 * decision - 2 * decision.max(1, keepdims=True))
            np.testing.assert_allclose(fit.validation, p / p.sum(1, keepdims=True), atol=2e-5)


@SLOWLY
@given(
    n=st.integers(20, 90),
    d=st.integers(1, 120),
    targets=st.integers(1, 3),
    seed=st.integers(0, 10_000),
)
def test_regression_equals_ridge(n, d, targets, seed):
    """Real targets: scikit-learn's Ridge, its values as predictions, its objective."""
    X, _ = blobs(n, d, 2, seed)
    rng = np.random.default_rng(seed)
    Y = rng.standard_normal((n, targets)) * 100 + X[:, :1] / (np.abs(X[:, :1]).max() + 1)
    fold = folds(n, 2, seed)
    for fit in fit_ridge_bank(
        TrainingData(X, Y, fold, targets, "regression"), [RidgeSpec(a) for a in (0.1, 10.0)]
    ):
        train = fold != fit.fold
        scaler = StandardScaler().fit(X[train].astype(np.float64))
        Z = scaler.transform(X[train].astype(np.float64))
        model = Ridge(fit.spec.alpha).fit(Z, Y[train])
        coefficients = model.coef_.reshape(targets, d)
        theirs = coefficients / scaler.scale_
        assert np.abs(fit.arrays["weight"] - theirs).max() <= 1e-6 * np.abs(theirs).max()
        residual = Y[train] - model.predict(Z).reshape(-1, targets)
        assert fit.objective == pytest.approx(
            np.sum(residual**2) + fit.spec.alpha * np.sum(coefficients**2), rel=1e-8
        )
        if fit.fold != REFIT:
            values = model.predict(scaler.transform(X[~train].astype(np.float64))).reshape(
                -1, targets
            )
            np.testing.assert_allclose(fit.validation, values, rtol=1e-4, atol=1e-2)


def test_multi_label_is_one_regression_per_label():
    """Labels share products unless they are balanced, each by its own counts; both equal the labels
    one at a time.
    """
    X, y = blobs(90, 12, 4, seed=0)
    Y = (y[:, None] <= np.arange(3)).astype(np.uint8)
    fold = folds(90, 3)
    for kind in ("none", "balanced"):
        specs = [RidgeSpec(2.0, kind)]
        for row, fit in enumerate(fit_ridge_bank(TrainingData(X, Y, fold, 3, "multi"), specs)):
            for label in range(3):
                one = fit_ridge_bank(TrainingData(X, Y[:, label].astype(np.int64), fold, 2), specs)[
                    row
                ]
                np.testing.assert_allclose(
                    fit.arrays["weight"][label], one.arrays["weight"][1], rtol=1e-5, atol=1e-9
                )


def test_the_gap_is_small_where_rows_are_nearly_interpolated():
    """D a little above the training rows, features of many scales, a weak penalty: solved well, and
    known to be.
    """
    for n, d, classes, seed in (
        (146, 101, 4, 558),
        (99, 100, 5, 618),
        (141, 113, 4, 8056),
        (103, 80, 4, 9315),
    ):
        X, y = blobs(n, d, classes, seed)
        specs = [RidgeSpec(alpha, standardize=False) for alpha in (0.01, 0.04)]
        for fit in fit_ridge_bank(TrainingData(X, y, folds(n, 3, seed), classes), specs):
            assert 0 <= fit.gap < 1e-9


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_validation_is_what_the_stored_arrays_predict(kind, offset):
    """Float32 arrays in raw coordinates lose digits at large offsets; the stored predictions show
    it.
    """
    X, y = blobs(200, 30, 3, seed=3)
    X += np.float32(offset)
    fold = folds(200, 3)
    target = {
        "single": y,
        "multi": (y[:, None] <= np.arange(3)).astype(np.uint8),
        "regression": X[:, :3] * 1.0,
    }[kind]
    for fit in fit_ridge_bank(
        TrainingData(X, target, fold, 3, kind), [RidgeSpec(a) for a in strengths(FEW)]
    ):
        if fit.fold != REFIT:
            predicted = predict_head(fit.spec, fit.arrays, X[fold == fit.fold], kind)
            np.testing.assert_allclose(fit.validation, predicted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d", [8, 150])
def test_batched_equals_one_at_a_time(d):
    """A bank of strengths and folds gives what each head gives alone."""
    X, y = blobs(100, d, 3, seed=1)
    fold = folds(100, 4)
    specs = [RidgeSpec(alpha) for alpha in strengths(MANY)]
    bank = {(f.spec, f.fold): f for f in fit_ridge_bank(TrainingData(X, y, fold, 3), specs)}
    for spec in specs[::5]:
        for held in (2, REFIT):
            only = np.where(fold == held, 0, TRAIN_ONLY)
            alone = fit_ridge_bank(TrainingData(X, y, only, 3), [spec], refit=held == REFIT)[-1]
            np.testing.assert_allclose(
                alone.arrays["weight"], bank[spec, held].arrays["weight"], rtol=1e-5, atol=1e-7
            )
            assert alone.objective == pytest.approx(bank[spec, held].objective, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("d", [6, 90])
def test_scales_and_constant_features(scale, d):
    """Standardized heads do not see the unit of a feature; constant features get no weight, in one
    fold or in all.
    """
    X, y = blobs(80, d, 3, seed=2)
    fold = folds(80, 2)
    X[:, 1] = 5.0
    X[fold == 1, 2] = 1.0  # constant where fold 0's head trains
    plain = fit_ridge_bank(TrainingData(X, y, fold, 3), [RidgeSpec(1.0)])
    scaled = fit_ridge_bank(TrainingData(X * np.float32(scale), y, fold, 3), [RidgeSpec(1.0)])
    for one, other in zip(plain, scaled, strict=True):
        assert (one.arrays["weight"][:, 1] == 0).all()
        assert one.fold != 0 or (one.arrays["weight"][:, 2] == 0).all()
        np.testing.assert_allclose(
            other.arrays["weight"] * scale, one.arrays["weight"], rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("d", [5, 60])
def test_no_penalty_gives_the_least_norm_solution(d):
    """alpha = 0 is least squares, and where it is not unique, the solution of least norm."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((40, d)).astype(np.float32)
    X[:, -1] = X[:, 0]  # not unique even with more rows than features
    Y = rng.standard_normal((40, 1))
    fold = np.full(40, TRAIN_ONLY, np.int16)
    fit = fit_ridge_bank(
        TrainingData(X, Y, fold, 1, "regression"), [RidgeSpec(0.0, standardize=False)]
    )[0]
    Z = X.astype(np.float64) - X.mean(0, dtype=np.float64)
    theirs = np.linalg.lstsq(Z, Y - Y.mean(), rcond=1e-10)[0].T
    np.testing.assert_allclose(fit.arrays["weight"], theirs, rtol=1e-4, atol=1e-6)


def test_a_class_missing_from_a_fold_is_never_preferred():
    """A class without training rows scores -1 everywhere; a training set of one class
    predicts it.
    """
    X, y = blobs(60, 5, 3, seed=5)
    y[y == 2] = 1
    y[7] = 2
    fold = folds(60, 3)
    for fit in fit_ridge_bank(
        TrainingData(X, y, fold, 3), [RidgeSpec(1.0), RidgeSpec(1.0, "balanced")]
    ):
        if fit.fold == fold[7]:
            assert np.abs(fit.arrays["weight"][2]).max() < 1e-12
            assert fit.arrays["bias"][2] == pytest.approx(-1)
            assert (fit.validation.argmax(1) != 2).all()
    fit = fit_ridge_bank(TrainingData(X, np.ones(60, np.int64), fold, 3), [RidgeSpec(1.0)])[0]
    assert (fit.validation.argmax(1) == 1).all()


def test_refusals_name_what_is_wrong():
    """NaN is refused with its row and column; negative strengths and targets that are not finite
    likewise.
    """
    X, y = blobs(20, 3, 2, seed=0)
    fold = folds(20, 2)
    broken = X.copy()
    broken[13, 2] = np.nan
    with pytest.raises(ValueError, match="feature 2 of row 13") as refused:
        fit_ridge_bank(TrainingData(broken, y, fold, 2), [RidgeSpec(1.0)])
    assert not isinstance(refused.value, HeadraceError)  # that would end the whole bank
    with pytest.raises(ValueError, match="alpha must be a number and not negative"):
        fit_ridge_bank(TrainingData(X, y, fold, 2), [RidgeSpec(-1.0)])
    with pytest.raises(ValueError, match="regression targets must be finite"):
        fit_ridge_bank(
            TrainingData(X, np.full((20, 1), np.nan), fold, 1, "regression"), [RidgeSpec(1.0)]
        )
    with pytest.raises(ValueError, match="fold has 19 rows"):
        fit_ridge_bank(TrainingData(X, y, fold[1:], 2), [RidgeSpec(1.0)])
