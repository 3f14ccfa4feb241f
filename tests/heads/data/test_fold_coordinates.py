"""Folds that share one copy of the rows, missing numbers included, have the heads of folds that are
imputed, scaled and trained one by one.
"""

from dataclasses import replace

import numpy as np
import pytest

from headrace.heads.data.fold_coordinates import FoldCoordinates
from headrace.heads.data.side_columns import SideColumn, SideColumns, side_blocks
from headrace.heads.data.task import REFIT
from headrace.heads.data.training_data import TrainingData
from headrace.heads.discriminant.bank import fit_discriminant_bank
from headrace.heads.discriminant.kind import LDASpec
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.linear.logistic import fit_logistic_bank
from headrace.heads.linear.ridge import fit_ridge_bank

FOLDS = 3


def _logistic(data, specs, refit):
    return fit_logistic_bank(data, specs, refit=refit, gap=1e-9)


def _ridge(data, specs, refit):
    return fit_ridge_bank(data, specs, refit=refit)


def _lda(data, specs, refit):
    return fit_discriminant_bank(data, specs, refit=refit)


def _data(n_rows, n_features, n_classes=3):
    """Four numbers: one missing anywhere and differing from fold to fold, one missing in fold 0
    alone, one there in fold 1 alone, and one that is there everywhere.
    """
    rng = np.random.default_rng(0)
    fold = np.arange(n_rows) % FOLDS
    target = rng.permutation(n_rows) % n_classes
    features = (rng.normal(size=(n_rows, n_features)) + 0.5 * target[:, None]).astype(np.float32)
    numbers = rng.normal(size=(n_rows, 4)) + 0.3 * target[:, None]
    numbers[:, 0] += fold
    numbers[rng.random(n_rows) < 0.3, 0] = np.nan
    numbers[(fold == 0) & (rng.random(n_rows) < 0.5), 1] = np.nan
    numbers[fold != 1, 2] = np.nan
    columns = tuple(SideColumn(f"number{k}", None, k < 3) for k in range(4))
    side = SideColumns(columns, numbers)
    X = np.concatenate([features, side.as_inputs()], axis=1)
    return TrainingData(
        X,
        target,
        fold,
        n_classes,
        sample_weight=rng.uniform(0.5, 2, n_rows),
        band_widths=(n_features // 2, X.shape[1] - n_features // 2),
        side=side_blocks(columns, n_features),
    )


def _fold_by_fold(fit, data, specs):
    """Decisions on all rows of heads that are trained on rows with the fills of their own fold."""
    n_features = data.side[0].start
    decisions = {}
    for fold in data.folds_to_fit(refit=True):
        train = data.training_rows(fold)
        X = data.X.astype(np.float64)
        for number in range(n_features, n_features + 6, 2):
            values = X[train, number][X[train, number + 1] == 0]
            X[X[:, number + 1] == 1, number] = values.mean() if len(values) else 0
        for head in fit(replace(data, X=X, side=()), specs, fold == REFIT):
            if head.fold == fold:
                decisions[specs.index(head.spec), fold] = (
                    X @ head.arrays["weight"].T + head.arrays["bias"]
                )
    return decisions


@pytest.mark.parametrize("shape", [(180, 20), (60, 90)], ids=["tall", "fewer rows than features"])
@pytest.mark.parametrize(
    ("fit", "specs", "tolerance"),
    [
        (_logistic, [LogisticSpec(0.1), LogisticSpec(1.0, "balanced", False)], 3e-3),
        (_logistic, [LogisticSpec(0.1, banded=True)], 3e-3),
        (_ridge, [RidgeSpec(3.0), RidgeSpec(30.0, "balanced", False)], 1e-5),
        (_ridge, [RidgeSpec(3.0, banded=True)], 1e-5),
        (_lda, [LDASpec(0.1), LDASpec(0.3, standardize=False)], 1e-4),
    ],
    ids=["logistic", "banded logistic", "ridge", "banded ridge", "lda"],
)
def test_shared_rows_give_the_heads_of_folds_one_by_one(fit, specs, tolerance, shape):
    data = _data(*shape)
    expected = _fold_by_fold(fit, data, specs)
    heads = fit(data, specs, True)
    assert len(heads) == len(expected) == len(specs) * (FOLDS + 1)
    for head in heads:
        decisions = data.X @ head.arrays["weight"].T + head.arrays["bias"]
        alone = expected[specs.index(head.spec), head.fold]
        np.testing.assert_allclose(decisions, alone, rtol=1e-5, atol=tolerance)


def test_many_class_heads_have_copies_in_the_units_of_their_fold():
    data, specs = _data(400, 10, 66), [LogisticSpec(0.1)]
    expected = _fold_by_fold(_logistic, data, specs)
    for head in _logistic(data, specs, True):
        decisions = data.X @ head.arrays["weight"].T + head.arrays["bias"]
        np.testing.assert_allclose(
            decisions, expected[specs.index(head.spec), head.fold], atol=5e-3
        )


def test_units_are_a_linear_map_and_its_inverse():
    rng = np.random.default_rng(0)
    coordinates = FoldCoordinates(rng.uniform(0.5, 2, 6), np.array([1, 4]), np.array([0.7, -3.0]))
    root = coordinates.weights(np.eye(6)).T
    w, z = rng.normal(size=(2, 6))
    np.testing.assert_allclose(coordinates.weights(w), root @ w)
    np.testing.assert_allclose(coordinates.common_weights(coordinates.weights(w)), w)
    np.testing.assert_allclose(coordinates.rows(z), np.linalg.solve(root.T, z))
    np.testing.assert_allclose(coordinates.penalty_gradient(w), root.T @ root @ w)
    np.testing.assert_allclose(coordinates.columns(1, 4).rows(z[1:4]), coordinates.rows(z)[1:4])
    assert coordinates.columns(0, 5).numbers.tolist() == [1]
