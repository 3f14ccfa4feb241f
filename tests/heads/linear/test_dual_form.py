"""Fewer rows than features: folds that share a design give the heads that each gives alone."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support.linear import blobs, folds, relative_gap

from headrace.heads.data.standardize import group_moments, training_moments
from headrace.heads.data.task import REFIT, TRAIN_ONLY
from headrace.heads.data.training_data import TrainingData
from headrace.heads.linear import logistic
from headrace.heads.linear.kind import LogisticSpec
from headrace.heads.linear.logistic import fit_logistic_bank
from headrace.heads.linear.solver.design import scales_are_similar
from headrace.heads.linear.solver.dual_form import make_dual_form

SLOWLY = settings(
    deadline=None, max_examples=8, suppress_health_check=list(HealthCheck), derandomize=True
)


def few(n, d, classes, seed):
    """Rows, their classes, and which of four folds holds them out."""
    return *blobs(n, d, classes, seed), folds(n, 4, seed)


def moments_of(X, fold):
    return training_moments(group_moments(X, fold))


def both_ways(data, specs, **options):
    """Heads of a shared design, and of designs of each fold's own."""
    options = {"gap": 1e-8} | options
    calls = []

    def counted(*args, **more):
        calls.append(len(args[2]))
        return make_dual_form(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logistic, "make_dual_form", counted)
        together = fit_logistic_bank(data, specs, **options)
        shared, calls[:] = max(calls), []
        patch.setattr(logistic, "copies_fit", lambda *_: False)
        apart = fit_logistic_bank(data, specs, **options)
    assert shared > 1
    return together, apart


def assert_same(together, apart, X):
    for one, other in zip(together, apart, strict=True):
        assert (one.spec, one.fold) == (other.spec, other.fold)
        assert one.error is other.error is None
        assert one.objective == pytest.approx(other.objective, rel=3e-5)
        ours, theirs = (X @ fit.arrays["weight"].T + fit.arrays["bias"] for fit in (one, other))
        # Decisions differ by the root of what objectives do.
        np.testing.assert_allclose(ours, theirs, atol=5e-3 * np.abs(theirs).max())


def test_rows_that_contradict_each_other_reach_the_gap():
    """Pairs of equal rows, each with a label of its own: nothing is separable, and the optimum is
    where the intercept says so.
    """
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((40, 300)), rng.integers(0, 2, 40)
    X[:, :3] += rng.standard_normal((2, 3))[y]
    X = X[np.arange(40) // 2].astype(np.float32)
    fold = (np.arange(40) // 2 % 10).astype(np.int16)
    specs = [LogisticSpec(C) for C in (1.0, 10.0, 100.0)]
    fits = fit_logistic_bank(TrainingData(X, y, fold, 2), specs, refit=False, gap=1e-5)
    assert max(relative_gap(fit, X[fold != fit.fold], y[fold != fit.fold]) for fit in fits) < 3e-5


@pytest.mark.parametrize("standardize", [True, False])
def test_a_small_fold_beside_a_large_one_is_as_it_is_alone(standardize):
    """Its coordinates and its preconditioner come from its own 18 rows, not from the 52 that it
    holds out.
    """
    rng = np.random.default_rng(51)
    X, y = rng.standard_normal((70, 513)), rng.integers(0, 5, 70)
    X[:, :2] += 2 * rng.standard_normal((5, 2))[y]
    X = X.astype(np.float32)
    fold = np.where(np.arange(70) < 52, 0, np.arange(70) % 3 + 1)
    own = fold != 0
    specs = [LogisticSpec(10.0, standardize=standardize)]
    beside = fit_logistic_bank(TrainingData(X, y, fold, 5), specs, refit=False)[0]
    (alone,) = fit_logistic_bank(TrainingData(X[own], y[own], np.full(18, TRAIN_ONLY), 5), specs)
    assert beside.fold == 0
    assert beside.objective == pytest.approx(alone.objective, rel=2e-5)
    assert beside.iterations <= 1.3 * alone.iterations + 2


@pytest.mark.slow
@SLOWLY
@given(
    n=st.integers(12, 60),
    more=st.integers(0, 200),
    classes=st.integers(2, 4),
    weighted=st.booleans(),
    class_weight=st.sampled_from(["none", "balanced"]),
    seed=st.integers(0, 2**16),
)
def test_a_shared_design_gives_each_folds_own_heads(n, more, classes, weighted, class_weight, seed):
    X, y, fold = few(n, n + 1 + more, classes, seed)
    X[:, 0] = np.where(fold == 1, X[:, 0], 3.0)  # constant where fold 1 is held out
    X[:, 1] = 7.0
    weight = np.random.default_rng(seed).uniform(0.2, 3, n) if weighted else None
    specs = [LogisticSpec(C, class_weight=class_weight) for C in (1e-3, 0.1, 10.0)]
    assert_same(*both_ways(TrainingData(X, y, fold, classes, sample_weight=weight), specs), X)


def test_labels_of_many_kinds_share_a_design():
    X, y, fold = few(50, 120, 3, 5)
    labels = np.stack([y == 0, y == 1, np.arange(50) % 3 == 0], axis=1).astype(np.int64)
    assert_same(
        *both_ways(
            TrainingData(X, labels, fold, 3, "multi"), [LogisticSpec(C) for C in (1e-2, 1.0)]
        ),
        X,
    )


def test_twins_share_a_design():
    """Directions that are hardly there: rows in pairs that differ in their last digits, and have
    labels of their own.
    """
    X, y, _ = few(40, 300, 3, 1)
    X = np.concatenate(
        [X, X * (1 + 1e-4 * np.random.default_rng(2).standard_normal(X.shape).astype(np.float32))]
    )
    y = np.concatenate([y, (y + 1) % 3])
    fold = (np.arange(80) % 4).astype(np.int16)
    assert_same(*both_ways(TrainingData(X, y, fold, 3), [LogisticSpec(C) for C in (1e-2, 1.0)]), X)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_units_do_not_matter(scale):
    X, y, fold = few(40, 90, 3, 2)
    specs = [LogisticSpec(C) for C in (1e-2, 1.0)]
    plain = fit_logistic_bank(TrainingData(X, y, fold, 3), specs, gap=1e-8)
    for one, other in zip(
        plain,
        fit_logistic_bank(TrainingData(X * np.float32(scale), y, fold, 3), specs, gap=1e-8),
        strict=True,
    ):
        assert one.objective == pytest.approx(other.objective, rel=1e-6)


def test_a_feature_that_only_one_row_shows_sends_folds_apart():
    """Its scale in the fold that holds this row out is a thousandth of the common one: float32
    could not bear the square.
    """
    X, _, fold = few(40, 90, 3, 3)
    X[:, 4] = 1e-3 * np.random.default_rng(0).standard_normal(40)
    X[7, 4] = 50.0
    moments = moments_of(X, fold)
    alike = [
        f for f in (0, 1, 2, 3) if scales_are_similar(moments[f], moments[REFIT], standardize=True)
    ]
    assert alike == [f for f in (0, 1, 2, 3) if f != fold[7]]
    X[7, 4] = 0.0
    moments = moments_of(X, fold)
    assert all(
        scales_are_similar(moments[f], moments[REFIT], standardize=True) for f in (0, 1, 2, 3)
    )


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("n", [60, 100, 200])
@pytest.mark.parametrize("feature", [4, slice(None)])
def test_a_fold_does_not_feel_how_far_out_a_row_lies_that_it_holds_out(n, standardize, feature):
    """With fewer rows than features in all, with fewer in a fold's training rows only, and with
    more.
    """
    rng = np.random.default_rng(5)
    X, y, fold = rng.standard_normal((n, 90)), np.arange(n) % 3, folds(n, 4, 5)
    X[:, :5] += rng.standard_normal((3, 5))[y]
    X = X.astype(np.float32)
    specs = [LogisticSpec(C, standardize=standardize) for C in (1e-3, 1e-1, 10.0)]
    row = int(np.flatnonzero(fold == 1)[0])
    X[row, feature] = 1e7
    with_it = [
        fit
        for fit in fit_logistic_bank(TrainingData(X, y, fold, 3), specs, gap=1e-7)
        if fit.fold == fold[row]
    ]
    train = fold != fold[row]
    none = np.full(int(train.sum()), TRAIN_ONLY, np.int16)
    without = fit_logistic_bank(TrainingData(X[train], y[train], none, 3), specs, gap=1e-7)
    for one, other in zip(with_it, without, strict=True):
        assert one.objective == pytest.approx(other.objective, rel=2e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_directions_of_rounding_alone_are_left_out(dtype):
    """All rows along one direction: the products' second eigenvalue is rounding, above the floor in
    some of these.
    """
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(4, 13))
        X = np.repeat(rng.standard_normal((n, 1)), 3000, axis=1).astype(dtype)
        y, fold = (np.arange(n) // 2) % 2, (np.arange(n) % 2).astype(np.int16)
        for fit in fit_logistic_bank(TrainingData(X, y, fold, 2), [LogisticSpec(1.0)]):
            assert np.isfinite(fit.objective)


def test_the_least_penalized_weights_are_the_ones_that_come_back():
    """v of coordinates u decides as u does on the fold's rows, and costs what u costs."""
    X, _, fold = few(30, 80, 3, 4)
    moments = moments_of(X, fold)
    rows = [((f,), np.flatnonzero(fold != f)) for f in range(4)]
    scaling = {f: moments[f] for f in (0, 1, 2, 3, REFIT)}
    design = make_dual_form(X, rows, scaling, standardize=True).design(np.float64)
    rng = np.random.default_rng(0)
    for block in design.row_blocks:
        (f,) = block.folds
        u = rng.standard_normal((3, design.n_coordinates))
        # a fold of fewer rows than another has fewer coordinates
        u[:, len(design.rotation.fold_spaces[f].pivot_rows) : -1] = 0
        weight, bias = design.to_raw_weights(u, np.full(3, f))
        np.testing.assert_allclose(
            X[block.row_index] @ weight.T + bias, block.values @ u.T, atol=1e-9
        )
        own = weight * moments[f].scale
        np.testing.assert_allclose((own**2).sum(axis=1), (u[:, :-1] ** 2).sum(axis=1), rtol=1e-9)
        np.testing.assert_allclose(
            design.from_raw_weights(weight, bias, np.full(3, f)), u, atol=1e-9
        )
