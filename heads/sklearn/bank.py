"""Any scikit-learn estimator as a head, named by its import path: one fit per fold, no batching.

N rows, D features, C outputs. The head trained on all rows stores those rows, and prediction fits
it again.
"""

import importlib
import inspect
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from headrace.cache.errors import HeadraceError
from headrace.heads.arrays import Array, Arrays, Floats
from headrace.heads.data.checks import check_finite, check_specs, row_weights
from headrace.heads.data.side_columns import SideBlock, as_cells
from headrace.heads.data.streamed import StreamedRows
from headrace.heads.data.task import REFIT, TEST, TaskKind
from headrace.heads.data.training_data import TrainingData
from headrace.heads.errors import HeadError
from headrace.heads.link import link
from headrace.heads.neighbors.bank import STORED_ROWS_BYTES
from headrace.heads.sklearn.kind import SklearnSpec
from headrace.heads.spec import FitResult

# The public modules whose classes are estimators and nothing else: importing them runs
# scikit-learn's own code alone.
_SAFE_MODULES = {
    *("calibration", "cross_decomposition", "discriminant_analysis", "dummy", "ensemble"),
    *("gaussian_process", "isotonic", "kernel_ridge", "linear_model", "naive_bayes"),
    *("neighbors", "neural_network", "svm", "tree"),
}
_PREDICTORS = (ClassifierMixin, RegressorMixin)
# Parameters that name other code or files: nested estimators, functions, joblib's cache of pickles.
_CODE_PARAMETERS = {
    *("estimator", "estimators", "base_estimator", "final_estimator", "regressor", "transformer"),
    *("steps", "kernel_params", "func", "inverse_func", "memory", "metric_params"),
}
# Predictions are an array of as many columns, and the number may come from a damaged file.
_MAX_OUTPUTS = 1_000_000


class BadEstimator(HeadraceError, ValueError):
    """The import path or its parameters do not make a scikit-learn estimator."""


def make_estimator(spec: SklearnSpec, side: Sequence[SideBlock] = ()) -> Any:
    """Return an unfitted estimator, with random_state 0 if it has one and the spec gives none.

    side: side columns, which `_cells` puts behind the features. Raises BadEstimator, saying what is
    wrong with the path or the parameters.
    """
    module, _, name = spec.estimator.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadEstimator(
            f"{spec.estimator!r} cannot be imported ({error}): give the full path, such as "
            "sklearn.ensemble.RandomForestClassifier"
        ) from error
    if not (inspect.isclass(kind) and issubclass(kind, BaseEstimator)):
        raise BadEstimator(
            f"{spec.estimator} is not a scikit-learn estimator (a subclass of "
            "sklearn.base.BaseEstimator)"
        )
    try:
        parameters = json.loads(spec.parameters)
        # The same rows must give the same estimator when it is fitted again.
        if "random_state" in inspect.signature(kind).parameters:
            parameters = {"random_state": 0} | parameters
        estimator = kind(**parameters)
    except (TypeError, ValueError) as error:
        raise BadEstimator(
            f"{spec.estimator} does not take {spec.parameters} ({error}): it takes "
            f"{', '.join(inspect.signature(kind).parameters)}"
        ) from error
    steps = [StandardScaler(), estimator] if spec.standardize else [estimator]
    if side:
        steps.insert(0, side_transformer(side))
    return make_pipeline(*steps) if len(steps) > 1 else estimator


def side_transformer(side: Sequence[SideBlock]) -> ColumnTransformer:
    """Return scikit-learn's transformer of features with K cells of side columns behind them.

    A missing number becomes the mean, and is marked in a column of its own; numbers are scaled. A
    category becomes a column for each of its levels.
    """
    n_features = side[0].start
    numbers = [n_features + k for k, block in enumerate(side) if not block.is_category]
    categories = [n_features + k for k, block in enumerate(side) if block.is_category]
    # A column of numbers that all training rows of a fold lack is kept, as zeros.
    imputer = SimpleImputer(add_indicator=True, keep_empty_features=True)
    return ColumnTransformer(
        [
            ("features", "passthrough", slice(0, n_features)),
            ("numbers", make_pipeline(imputer, StandardScaler()), numbers),
            ("categories", OneHotEncoder(handle_unknown="ignore", sparse_output=False), categories),
        ]
    )


def _cells(X: Array, side: Sequence[SideBlock]) -> Array:
    """Return a head's input (n, D + R) as `side_transformer` takes it, (n, D + K)."""
    if not side:
        return X
    return np.concatenate([X[:, : side[0].start], as_cells(X, side)], axis=1)


def estimator_code(spec: SklearnSpec) -> str | None:
    """Return the "module:class" that the spec imports and calls, None if only scikit-learn's code.

    That is a classifier or regressor in a public module of the installed scikit-learn, whose
    parameters are values. Nothing but those modules is imported to find out.
    """
    module, _, name = spec.estimator.rpartition(".")
    named_code = f"{module}:{name}"
    package, _, submodule = module.partition(".")
    if package != "sklearn" or submodule not in _SAFE_MODULES or name.startswith("_"):
        return named_code
    kind = getattr(importlib.import_module(module), name, None)
    if not (
        inspect.isclass(kind) and issubclass(kind, BaseEstimator) and issubclass(kind, _PREDICTORS)
    ):
        return named_code
    # A name that the module has imported from elsewhere.
    if not f"{kind.__module__}.".startswith(f"{module}."):
        return named_code
    try:
        parameters = json.loads(spec.parameters)
    except ValueError:
        return named_code
    if not isinstance(parameters, dict) or not _CODE_PARAMETERS.isdisjoint(parameters):
        return named_code
    # Each job may be a process: a model's file must not start a thousand of them.
    jobs = parameters.get("n_jobs")
    is_affordable = jobs is None or (isinstance(jobs, int) and abs(jobs) <= (os.cpu_count() or 1))
    return None if is_affordable else named_code


def fit_sklearn_bank(
    data: TrainingData, specs: Sequence[SklearnSpec], *, refit: bool = True
) -> list[FitResult]:
    """Fit every spec on every fold, one by one.

    data: X (N, D), in memory. What an estimator raises is its head's error.
    """
    check_specs(specs, 'SklearnSpec("sklearn.svm.SVC")')
    X = data.X
    assert not isinstance(X, StreamedRows)  # an estimator of scikit-learn takes an array
    check_finite(X)
    weight = row_weights(data.sample_weight, len(X))
    usable_rows = np.flatnonzero((data.fold != TEST) & (weight > 0))
    # A fitted estimator has no form on disk but a pickle, which headrace neither writes nor reads.
    # So its rows are stored, and prediction fits it again.
    stored: Arrays = {}
    if refit and len(usable_rows) * X.shape[1] * 4 <= STORED_ROWS_BYTES:
        stored = {
            "features": np.ascontiguousarray(X[usable_rows], np.float32),
            "target": np.ascontiguousarray(data.target[usable_rows]),
            "sample_weight": weight[usable_rows],
            "outputs": np.array([data.n_outputs]),
        }
        if data.side:
            stored["side"] = np.array(data.side, np.int64)
    fits = []
    for spec in specs:
        for held_out_fold in data.folds_to_fit(refit=refit):
            started = time.perf_counter()
            validation, error = None, None
            try:
                if held_out_fold == REFIT:
                    make_estimator(spec, data.side)  # fitted when it predicts
                else:
                    rows = usable_rows[data.fold[usable_rows] != held_out_fold]
                    estimator = _fitted(
                        spec, X[rows], data.target[rows], weight[rows], data.task_kind, data.side
                    )
                    held_out_features = X[data.fold == held_out_fold]
                    validation = _probabilities(
                        estimator, held_out_features, data.n_outputs, data.task_kind, data.side
                    )
            except Exception as caught:  # noqa: BLE001 (any estimator may raise anything: a failed row, the others go on)
                error = f"{type(caught).__name__}: {caught}"
            fits.append(
                FitResult(
                    spec,
                    held_out_fold,
                    stored if held_out_fold == REFIT and error is None else {},
                    seconds=time.perf_counter() - started,
                    validation=validation,
                    error=error,
                )
            )
    return fits


def fitted_sklearn(spec: SklearnSpec, arrays: Arrays, task: TaskKind) -> Callable[[Array], Floats]:
    """Fit the estimator on the stored rows; return its function from features (n, D) to (n, C).

    Raises BadEstimator, and HeadError for rows that are absent or cannot be fitted.
    """
    if "features" not in arrays:
        raise HeadError(
            f"{spec.estimator}: its training rows were not stored: train it again on them"
        )
    try:
        outputs, target = int(arrays["outputs"].item()), arrays["target"]
        if task == "single" and not 0 <= target.min() <= target.max() < outputs <= _MAX_OUTPUTS:
            raise HeadError(f"its rows are of other classes than its {outputs} outputs")
        side = [
            SideBlock(bool(is_category), int(start), int(stop))
            for is_category, start, stop in arrays.get("side", ())
        ]
        estimator = _fitted(spec, arrays["features"], target, arrays["sample_weight"], task, side)
    except BadEstimator:
        raise
    except Exception as error:
        # On the rows of a damaged file an estimator may raise anything.
        raise HeadError(
            f"{spec.estimator}: it cannot be fitted again on its stored rows "
            f"({type(error).__name__}: {str(error)[:200]}): train it again, or fetch the model "
            "again"
        ) from error
    return lambda X: _probabilities(estimator, X, outputs, task, side)


def _fitted(
    spec: SklearnSpec,
    X: Array,
    target: Array,
    weight: Array,
    task: TaskKind,
    side: Sequence[SideBlock],
) -> Any:
    estimator = make_estimator(spec, side)
    if task == "regression" and target.shape[1:] == (1,):
        target = target[:, 0]
    fit_options: dict[str, Any] = {}
    if not np.all(weight == weight[:1]):
        last_step, option = estimator, "sample_weight"
        if isinstance(estimator, Pipeline):
            name, last_step = estimator.steps[-1]
            option = f"{name}__sample_weight"
        if "sample_weight" not in inspect.signature(last_step.fit).parameters:
            raise BadEstimator(
                f"{spec.estimator} takes no sample weights: leave the weight column out, or use "
                "another estimator"
            )
        fit_options = {option: weight}
    with warnings.catch_warnings():
        # Of convergence and the like: scores show what they mean for this head.
        warnings.simplefilter("ignore")
        return estimator.fit(_cells(X, side), target, **fit_options)


def _probabilities(
    estimator: Any, X: Array, outputs: int, task: TaskKind, side: Sequence[SideBlock]
) -> Floats:
    X = _cells(X, side)
    has_probabilities = hasattr(estimator, "predict_proba")
    if task == "regression" or (task == "multi" and not has_probabilities):
        return np.asarray(estimator.predict(X), np.float32).reshape(len(X), outputs)
    if task == "multi":
        probabilities = estimator.predict_proba(X)
        # One array (n, 2) per label; (n, 1) if a label was constant in training.
        if isinstance(probabilities, list):
            constant = np.asarray(estimator.predict(X), np.float32)
            probabilities = [
                p[:, 1] if p.shape[1] == 2 else constant[:, label]
                for label, p in enumerate(probabilities)
            ]
            return np.stack(probabilities, axis=1).astype(np.float32)
        return np.asarray(probabilities, np.float32).reshape(len(X), outputs)
    if has_probabilities:
        probabilities = estimator.predict_proba(X)
    elif hasattr(estimator, "decision_function"):
        decision = np.asarray(estimator.decision_function(X), np.float64)
        # Two classes have one decision, the log-odds of the second.
        probabilities = link(decision.reshape(len(X), -1), "single")
    else:
        probabilities = np.asarray(estimator.predict(X))[:, None] == estimator.classes_
    predicted = np.zeros((len(X), outputs), np.float32)
    # A class without training rows has probability 0.
    predicted[:, np.asarray(estimator.classes_, np.int64)] = probabilities
    return predicted
