"""Side columns beside features: equal to scikit-learn's transformers inside each fold."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from headrace.heads.bank import fit_bank
from headrace.heads.data.side_columns import (
    SideColumn,
    SideColumns,
    as_cells,
    load_side_columns,
    save_side_columns,
    side_blocks,
)
from headrace.heads.data.task import REFIT, Task
from headrace.heads.discriminant.kind import LDASpec
from headrace.heads.errors import HeadError
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.neighbors.kind import KNNSpec
from headrace.heads.networks.kind import MLPSpec
from headrace.heads.predict import predict_head
from headrace.heads.sklearn.kind import SklearnSpec

N, D, FOLDS = 240, 6, 4


@pytest.fixture(scope="module")
def rows():
    """Features and side columns whose statistics differ from fold to fold: ages grow with the fold,
    a fifth is missing, and one site is in one fold alone.
    """
    generator = np.random.default_rng(0)
    fold = (np.arange(N) % FOLDS).astype(np.int16)
    features = generator.normal(size=(N, D)).astype(np.float32)
    age = generator.normal(60, 10, N) + 8 * fold
    age[generator.random(N) < 0.2] = np.nan
    exposure = generator.normal(size=N)
    site = generator.integers(0, 3, N).astype(float)
    site[(fold == 1) & (site == 2)] = 3  # a site that the other folds have not seen
    target = ((features[:, 0] + (site == 1) + np.nan_to_num(age - 65) / 20) > 0.3).astype(np.int64)
    columns = (
        SideColumn("age", None, True, float(np.nanmean(age)), float(np.nanstd(age))),
        SideColumn("exposure", None, False, float(exposure.mean()), float(exposure.std())),
        SideColumn("site", ("a", "b", "c", "d")),
    )
    side = SideColumns(columns, np.stack([age, exposure, site], axis=1))
    ids = np.arange(N).astype(str)
    task = Task("single", ("no", "yes"), ids, ids.astype("S32"), target, fold, np.ones(N))
    return features, side, task


def _heads(rows, specs):
    features, side, task = rows
    X = np.concatenate([features, side.as_inputs()], axis=1)
    return X, fit_bank(X, task, specs, side=side.columns)


def _encoder():
    numbers = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler())
    return ColumnTransformer(
        [
            ("features", "passthrough", slice(0, D)),
            ("numbers", numbers, [D, D + 1]),
            ("site", OneHotEncoder(handle_unknown="ignore", sparse_output=False), [D + 2]),
        ]
    )


def _folds(rows, estimator):
    """The estimator's own answer of each fold: fitted on its training rows alone."""
    features, side, task = rows
    table = np.concatenate([features, side.values], axis=1)
    for fold in range(FOLDS):
        train, held = task.fold != fold, task.fold == fold
        yield estimator.fit(table[train], task.target[train]), table[held]


@pytest.mark.parametrize("missing", [True, False])
def test_logistic_heads_are_those_of_the_pipeline_in_every_fold(rows, missing):
    if not missing:
        features, side, task = rows
        values = np.where(np.isnan(side.values), 70.0, side.values)
        columns = (replace(side.columns[0], has_missing=False), *side.columns[1:])
        rows = features, SideColumns(columns, values), task
    solver = LogisticRegression(C=0.3, tol=1e-10, max_iter=10_000)
    pipeline = make_pipeline(_encoder(), StandardScaler(), solver)
    _, heads = _heads(rows, [LogisticSpec(0.3)])
    for fold, (fitted, held) in enumerate(_folds(rows, pipeline)):
        expected = fitted.predict_proba(held)
        np.testing.assert_allclose(heads[fold].validation, expected, atol=2e-3)


def test_ridge_and_lda_are_those_of_the_pipeline_in_every_fold(rows):
    ridge = make_pipeline(_encoder(), StandardScaler(), RidgeClassifier(alpha=3.0))
    X, heads = _heads(rows, [RidgeSpec(3.0)])
    task = rows[2]
    for fold, (fitted, held) in enumerate(_folds(rows, ridge)):
        arrays = heads[fold].arrays
        decision = X[task.fold == fold] @ arrays["weight"].T + arrays["bias"]
        np.testing.assert_allclose(decision[:, 1], fitted.decision_function(held), atol=1e-5)
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1)
    _, heads = _heads(rows, [LDASpec(0.1)])
    # The shrunken covariance counts a fold's columns, and a fold of headrace's has those of the
    # sites that it has not seen too: zeros, each with a share of the mean variance.
    for fold, (fitted, held) in enumerate(
        _folds(rows, make_pipeline(_encoder(), StandardScaler(), lda))
    ):
        if fold != 1:
            np.testing.assert_allclose(
                heads[fold].validation, fitted.predict_proba(held), atol=2e-5
            )


def test_an_estimator_of_scikit_learn_is_the_pipeline_itself(rows):
    forest = RandomForestClassifier(20, random_state=0)
    spec = SklearnSpec("sklearn.ensemble.RandomForestClassifier", '{"n_estimators": 20}')
    X, heads = _heads(rows, [spec])
    for fold, (fitted, held) in enumerate(_folds(rows, make_pipeline(_encoder(), forest))):
        # The float32 of an age may fall on the other side of a split.
        assert np.mean(np.abs(heads[fold].validation - fitted.predict_proba(held)) < 1e-6) > 0.95
    refit = heads[-1]
    assert refit.fold == REFIT
    assert predict_head(spec, refit.arrays, X[:5]).shape == (5, 2)


def test_no_head_learns_from_the_rows_that_it_is_scored_on(rows):
    """A trap: the held-out fold's ages and sites change, which a statistic of all rows would show
    in that fold's head.
    """
    features, side, task = rows
    specs = [LogisticSpec(0.3)], [RidgeSpec(3.0)], [MLPSpec((8,), epochs=3, patience=3)]
    trapped = side.values.copy()
    held = task.fold == 2
    trapped[held, 0] = 1000 * task.target[held]  # the target itself, in other units
    trapped[held, 2] = task.target[held]
    for bank in specs:
        _, plain = _heads((features, side, task), bank)
        _, changed = _heads((features, SideColumns(side.columns, trapped), task), bank)
        if bank[0].kind == "mlp":  # whose best epoch is chosen on the held-out rows
            assert plain[2].arrays.keys() == changed[2].arrays.keys()
            continue
        for name, array in plain[2].arrays.items():
            np.testing.assert_allclose(array, changed[2].arrays[name], atol=1e-3)


def test_perceptrons_of_a_fold_see_its_own_statistics(rows):
    """Trained on inputs that scikit-learn has imputed by the fold's rows, the same network."""
    features, side, task = rows
    fold, inputs = 2, side.as_inputs()
    train = task.fold != fold
    spec = MLPSpec((8,), epochs=4, patience=4)
    _, heads = _heads(rows, [spec])
    ages = np.where(inputs[:, 1] > 0, np.nan, inputs[:, 0])[:, None]
    imputer = SimpleImputer().fit(ages[train])
    imputed = inputs.copy()
    imputed[:, :1] = imputer.transform(ages)
    imputed[:, inputs[train].std(0) == 0] = 0  # a level that no training row has
    X = np.concatenate([features, imputed], axis=1)
    other = fit_bank(X, task, [spec])
    np.testing.assert_allclose(heads[fold].validation, other[fold].validation, atol=2e-5)


def test_predictions_of_held_out_rows_are_those_of_the_stored_arrays(rows):
    for spec in (LogisticSpec(1.0), MLPSpec((8,), epochs=2), LDASpec(0.1)):
        X, heads = _heads(rows, [spec])
        held = rows[2].fold == 1
        predicted = predict_head(spec, heads[1].arrays, X[held])
        np.testing.assert_allclose(predicted, heads[1].validation, atol=1e-5)


def test_a_kind_without_side_columns_says_which_kinds_take_them(rows):
    with pytest.raises(
        HeadError, match="knn heads take no side columns: logistic, ridge, lda, mlp"
    ):
        _heads(rows, [KNNSpec(3)])


def test_cells_are_what_inputs_were_made_of(rows):
    _, side, _ = rows
    values = side.values.copy()
    values[5, 2] = np.nan  # a site that no training row has
    inputs = SideColumns(side.columns, values).as_inputs()
    cells = as_cells(inputs, side_blocks(side.columns, 0))
    age = (values[:, 0] - side.columns[0].center) / side.columns[0].spread
    np.testing.assert_allclose(cells[:, 0], age, rtol=1e-6)
    np.testing.assert_array_equal(cells[:, 2], values[:, 2])


def test_a_file_of_side_columns_is_read_back_and_checked(rows, tmp_path):
    path = tmp_path / "side.npz"
    save_side_columns(rows[1], path)
    assert load_side_columns(path).fingerprint == rows[1].fingerprint
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="has changed since it was written"):
        load_side_columns(path)
