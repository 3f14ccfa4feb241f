"""Banded heads: proportions from held-out errors of the training rows alone, and then the solvers'
own heads.
"""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from headrace.heads.data.standardize import group_moments, training_moments
from headrace.heads.data.task import REFIT, TRAIN_ONLY
from headrace.heads.data.training_data import TrainingData
from headrace.heads.linear.bands import DRAWN_FOLDS, held_out_error, with_bands
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.linear.logistic import fit_logistic_bank
from headrace.heads.linear.ridge import fit_ridge_bank
from headrace.pipelines.recipe.grid import requested_heads
from headrace.pipelines.recipe.heads import Heads

WIDTHS = (4, 30, 50)


def taps(n=240, classes=4, seed=0):
    """Three taps side by side, of which the first, which is narrow, tells the classes apart.

    (n, 84) float32, (n,), (n,).
    """
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    told = rng.standard_normal((classes, WIDTHS[0]))[y] * 1.5
    X = rng.standard_normal((n, sum(WIDTHS)))
    X[:, : WIDTHS[0]] += told
    return (
        (X * 10 ** rng.uniform(-2, 2, X.shape[1])).astype(np.float32),
        y,
        (np.arange(n) % 5).astype(np.int64),
    )


def emphases(X, y, fold):
    return {
        key: own.emphasis
        for key, own in with_bands(
            TrainingData(X, y, fold, 4, band_widths=WIDTHS),
            training_moments(group_moments(X, fold)),
        ).items()
    }


def held_out_residuals(d, kernels, Y, blocks):
    """Kernel ridge regression without each block, block by block."""
    M, residuals = np.einsum("b,bij->ij", np.exp(d), kernels) + 1.0, np.zeros_like(Y)
    for held in blocks:
        rest = np.setdiff1d(np.arange(len(Y)), held)
        told = M[np.ix_(held, rest)] @ np.linalg.solve(
            M[np.ix_(rest, rest)] + np.eye(len(rest)), Y[rest]
        )
        residuals[held] = Y[held] - told
    return residuals


def differences(function, d):
    """Central differences by each of d, side by side in the first axis."""
    return np.stack([(function(d + step) - function(d - step)) / 2e-5 for step in 1e-5 * np.eye(3)])


def test_the_error_is_that_of_kernel_ridge_regression_without_each_block_and_so_are_its_derivatives():
    rng = np.random.default_rng(0)
    Z = [rng.standard_normal((60, width)) for width in WIDTHS]
    kernels = np.stack([z @ z.T / z.shape[1] for z in Z])
    Y = Z[0][:, :2] + rng.standard_normal((60, 2))
    blocks, d = np.array_split(rng.permutation(60), DRAWN_FOLDS), np.array([0.4, -0.7, 0.3])
    whole, half = np.eye(2), np.eye(2)[:, :1]

    error, gradient, curvature = held_out_error(d, kernels, Y, blocks, whole)
    # relative tolerances: and the pull towards equality
    assert error == pytest.approx((held_out_residuals(d, kernels, Y, blocks) ** 2).sum(), rel=1e-4)
    by_hand = differences(lambda d: held_out_error(d, kernels, Y, blocks, whole)[0], d)
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-5)
    slopes = differences(lambda d: held_out_residuals(d, kernels, Y, blocks), d)
    np.testing.assert_allclose(curvature, 2 * np.einsum("ijk,ljk->il", slopes, slopes), rtol=1e-3)

    same_error, same_gradient, sketched = held_out_error(d, kernels, Y, blocks, half)
    assert same_error == error
    np.testing.assert_array_equal(same_gradient, gradient)
    first = slopes[..., 0]
    np.testing.assert_allclose(sketched, 2 * first @ first.T, rtol=1e-2)


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_the_tap_that_tells_counts_more(kind: str) -> None:
    X, y, fold = taps()
    target = {
        "single": y,
        "multi": (y[:, None] == np.arange(4)).astype(np.uint8),
        "regression": 1e4 * np.eye(4)[y],
    }[kind]
    for emphasis in emphases(X, target, fold).values():
        by_tap = [np.unique(part) for part in np.split(emphasis, np.cumsum(WIDTHS)[:-1])]
        assert [len(part) for part in by_tap] == [1, 1, 1]
        assert by_tap[0] > 4 * max(by_tap[1], by_tap[2])
        assert (emphasis**2).mean() == pytest.approx(1)


def test_a_folds_heads_do_not_know_its_labels() -> None:
    """Other labels of the rows held out leave a fold's proportions, and its heads, as they are to
    the last bit.
    """
    X, y, fold = taps()
    other = np.where(fold == 2, (y + 1) % 4, y)
    before, after = emphases(X, y, fold), emphases(X, other, fold)
    np.testing.assert_array_equal(before[2], after[2])
    assert (before[REFIT] != after[REFIT]).any()
    first, second = (
        {
            fit.fold: fit
            for fit in fit_ridge_bank(
                TrainingData(X, each, fold, 4, band_widths=WIDTHS), [RidgeSpec(10.0, banded=True)]
            )
        }
        for each in (y, other)
    )
    np.testing.assert_array_equal(first[2].arrays["weight"], second[2].arrays["weight"])


def test_heads_are_scikit_learns_on_features_in_these_proportions() -> None:
    X, y, fold = taps()
    found = emphases(X, y, fold)
    ridge = fit_ridge_bank(
        TrainingData(X, y, fold, 4, band_widths=WIDTHS),
        [RidgeSpec(30.0, banded=True), RidgeSpec(30.0)],
    )
    logistic = fit_logistic_bank(
        TrainingData(X, y, fold, 4, band_widths=WIDTHS), [LogisticSpec(0.03, banded=True)], gap=1e-9
    )
    for fit in [*ridge, *logistic]:
        train = fold != fit.fold
        rows = X[train].astype(np.float64)
        scale = rows.std(axis=0) / (found[fit.fold] if fit.spec.banded else 1.0)
        Z = (rows - rows.mean(axis=0)) / scale
        if isinstance(fit.spec, RidgeSpec):
            wanted, tolerance = (
                Ridge(fit.spec.alpha).fit(Z, 2 * np.eye(4)[y[train]] - 1).coef_,
                1e-5,
            )
        else:
            wanted, tolerance = (
                LogisticRegression(C=fit.spec.C, tol=1e-9, max_iter=5000).fit(Z, y[train]).coef_,
                2e-3,
            )
        own = fit.arrays["weight"] * scale
        assert np.abs(own - wanted).max() <= tolerance * np.abs(wanted).max()


def test_few_rows_and_splits_of_ones_own() -> None:
    """A single validation split, and rows of one class: no proportions can be wrong enough to
    raise.
    """
    X, y, _ = taps(n=40)
    given = np.where(np.arange(40) < 12, 0, TRAIN_ONLY)
    assert set(emphases(X, y, given)) == {0, REFIT}
    scaling = training_moments(group_moments(X, given))
    constant = TrainingData(X, np.zeros(40, np.int64), given, 1, band_widths=WIDTHS)
    assert all(own.emphasis is None for own in with_bands(constant, scaling).values())
    with pytest.raises(ValueError, match=r"bands of \[4, 30\] features were given for 84"):
        with_bands(TrainingData(X, y, given, 4, band_widths=WIDTHS[:2]), scaling)


def test_a_feature_that_never_varies_has_no_weight() -> None:
    X, y, fold = taps()
    X[:, 7] = 3.0
    for fit in fit_ridge_bank(
        TrainingData(X, y, fold, 4, band_widths=WIDTHS), [RidgeSpec(1.0, banded=True)]
    ):
        assert (fit.arrays["weight"][:, 7] == 0).all()
        assert np.isfinite(fit.arrays["weight"]).all()


def test_a_single_tap_has_no_banded_heads() -> None:
    """Nothing stands beside it: its heads are trained once."""
    heads = Heads.model_validate(
        {"ridge": {"alpha": [1.0], "banded": [False, True], "inputs": ["each", "all"]}}
    )
    wanted = requested_heads(heads, ["early.avg", "late.avg"])
    assert [(each.inputs, [spec.banded for spec in each.specs]) for each in wanted] == [
        (("early.avg",), [False]),
        (("late.avg",), [False]),
        (("early.avg", "late.avg"), [False]),
        (("early.avg", "late.avg"), [True]),
    ]
    assert dataclasses.replace(wanted[-1].specs[0], banded=False) == wanted[0].specs[0]


def test_views_of_an_image_do_not_tell_each_other() -> None:
    """With a split of one's own, too: the second tap knows each image again and nothing of its
    class.
    """
    rng = np.random.default_rng(0)
    y, given = rng.integers(0, 3, 150), np.where(np.arange(150) < 40, 0, TRAIN_ONLY)
    told, image = rng.standard_normal((150, 20)), rng.standard_normal((150, 200))
    told[:, :3] += 1.2 * np.eye(3)[y]
    views = [np.hstack([told + rng.standard_normal(told.shape), image]) for _ in range(2)]
    X, target, fold = np.vstack(views), np.tile(y, 2), np.tile(given, 2)
    data = TrainingData(X, target, fold, 2, band_widths=(20, 200), n_views=2)
    found = with_bands(data, training_moments(group_moments(X, fold)))[0].emphasis
    assert found is not None
    assert found[0] > 2 * found[-1]
