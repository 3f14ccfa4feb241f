"""Estimators of scikit-learn as heads: their settings, and what banks ask of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from headrace.heads.arrays import Arrays, Floats
from headrace.heads.data.task import TaskKind
from headrace.heads.data.training_data import TrainingData
from headrace.heads.evaluate.temperature import FLOOR, vote_floor
from headrace.heads.kind import FitOptions, HeadKind
from headrace.heads.link import tempered
from headrace.heads.spec import FitResult, check_choices

# Estimators whose probabilities are shares of votes, of trees or neighbours. Many shares are
# exactly 0, so a temperature, which works on logarithms, needs a higher floor for them: see
# `vote_floor`.
_VOTERS = frozenset(
    f"sklearn.{name}Classifier"
    for name in (
        "ensemble.RandomForest",
        "ensemble.ExtraTrees",
        "ensemble.Bagging",
        "tree.DecisionTree",
        "tree.ExtraTree",
        "neighbors.KNeighbors",
        "neighbors.RadiusNeighbors",
    )
)


@dataclass(frozen=True)
class SklearnSpec:
    """Any scikit-learn estimator, "sklearn.svm.SVC", with its keyword arguments as JSON text."""

    estimator: str
    parameters: str = "{}"
    standardize: bool = False
    kind: Literal["sklearn"] = "sklearn"

    def __post_init__(self) -> None:
        check_choices(self)


def counts_votes(spec: SklearnSpec) -> bool:
    """Return whether the estimator's probabilities are shares of votes."""
    return spec.estimator in _VOTERS


def fit_sklearn(data: TrainingData, specs: Sequence[Any], options: FitOptions) -> list[FitResult]:
    """Fit the estimators one by one."""
    from headrace.heads.sklearn.bank import fit_sklearn_bank

    return fit_sklearn_bank(data, specs, refit=options.refit)


def predict_estimator(
    spec: Any, arrays: Arrays, X: Floats, task_kind: TaskKind, temperature: float
) -> Floats:
    """Return (n, C) predictions of rows X (n, D)."""
    from headrace.heads.sklearn.bank import fitted_sklearn

    predicted = fitted_sklearn(spec, arrays, task_kind)(X)
    floor = vote_floor(task_kind, predicted.shape[1]) if counts_votes(spec) else FLOOR
    return tempered(predicted, task_kind, temperature, floor)


def external_code(spec: Any) -> str | None:
    """Return the "module:class" that the spec imports, unless it is scikit-learn's own."""
    from headrace.heads.sklearn.bank import estimator_code

    return estimator_code(spec)


def estimator_cost(
    spec: SklearnSpec, n_rows: int, n_features: int, n_outputs: int, n_fits: int
) -> tuple[float, float]:
    """Return estimated core-seconds: of a bank for any number of specs, and added by this one.

    Estimators share no work, so the first is 0. The second is a forest's: no rule fits them all.
    """
    return 0.0, n_fits * 1e-7 * n_rows * n_features


SKLEARN = HeadKind(
    name="sklearn",
    summary="Estimators of scikit-learn",
    spec=SklearnSpec,
    fit=fit_sklearn,
    predict=predict_estimator,
    cost=estimator_cost,
    axes=(),  # a recipe names the estimator's own parameters
    open_ended=(
        *("C", "alpha", "gamma", "n_neighbors"),
        *("max_depth", "max_iter", "n_estimators", "learning_rate"),
    ),
    input_array="features",
    streams=False,  # an estimator takes an array, and nothing else
    takes_side_columns=True,
    counts_votes=counts_votes,
    external_code=external_code,
)
