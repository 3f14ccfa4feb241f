"""The kinds of heads "logistic" and "ridge"."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Gt

from headrace.heads.arrays import Arrays
from headrace.heads.data.training_data import TrainingData
from headrace.heads.kind import FitOptions, HeadKind
from headrace.heads.layers import Layers, linear_layers, predict_by_layers
from headrace.heads.spec import ClassWeight, FitResult, check_choices

# Factor from the decisions of ridge, which fits -1/+1, to log-odds. With 2 a perfect fit of two
# classes has the probability sigmoid(4): it should be sure.
RIDGE_LOG_ODDS = 2.0


@dataclass(frozen=True)
class LogisticSpec:
    """L2-regularized (multinomial) logistic regression with scikit-learn's objective.

    It minimizes sum_i w_i loss_i + |W|^2 / (2 C), if `standardize` on features standardized with
    the mean and standard deviation of the head's own training rows.
    """

    # inverse strength of the L2 penalty, as in scikit-learn
    C: Annotated[float, Gt(0)]
    # balanced: every class counts the same
    class_weight: ClassWeight = "none"
    standardize: bool = True
    # true: each of several taps side by side has a strength of its own, in proportions found on the
    # training rows
    banded: bool = False
    kind: Literal["logistic"] = "logistic"

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class RidgeSpec:
    """Ridge regression, |XW - Y|^2 + alpha |W|^2, on real targets or classes coded -1/+1.

    Rows are weighted and features standardized as those of `LogisticSpec`.
    """

    # strength of the L2 penalty, as in scikit-learn
    alpha: Annotated[float, Gt(0)]
    # balanced: every class counts the same
    class_weight: ClassWeight = "none"
    standardize: bool = True
    # true: each of several taps side by side has a strength of its own, in proportions found on the
    # training rows
    banded: bool = False
    kind: Literal["ridge"] = "ridge"

    def __post_init__(self) -> None:
        check_choices(self)


def fit_logistic(data: TrainingData, specs: Sequence[Any], options: FitOptions) -> list[FitResult]:
    """Train a bank of logistic heads."""
    from headrace.heads.linear.logistic import fit_logistic_bank

    return fit_logistic_bank(data, specs, refit=options.refit, device=options.device)


def fit_ridge(data: TrainingData, specs: Sequence[Any], options: FitOptions) -> list[FitResult]:
    """Train a bank of ridge heads."""
    from headrace.heads.linear.ridge import fit_ridge_bank

    return fit_ridge_bank(data, specs, refit=options.refit)


def logistic_layers(spec: LogisticSpec, arrays: Arrays) -> Layers:
    """Return the layer of a logistic head, whose outputs are log-odds."""
    return linear_layers(arrays)


def ridge_layers(spec: RidgeSpec, arrays: Arrays) -> Layers:
    """Return the layer of a ridge head."""
    return linear_layers(arrays, RIDGE_LOG_ODDS)


def logistic_cost(
    spec: LogisticSpec, n_rows: int, n_features: int, n_outputs: int, n_fits: int
) -> tuple[float, float]:
    """Return (seconds of the Gram matrix, seconds of a spec's D × C matrices)."""
    gram = 2e-10 * n_rows * n_features * min(n_features, n_rows)
    return gram, n_fits * 1.5e-6 * n_features * n_outputs


def ridge_cost(
    spec: RidgeSpec, n_rows: int, n_features: int, n_outputs: int, n_fits: int
) -> tuple[float, float]:
    """Return (seconds of the Gram matrix, seconds of a spec's D × C matrices)."""
    gram = 1.1e-10 * n_rows * n_features * min(n_features, n_rows)
    return gram, n_fits * 3.4e-7 * n_features * n_outputs


LOGISTIC = HeadKind(
    name="logistic",
    summary="Logistic regression",
    spec=LogisticSpec,
    fit=fit_logistic,
    predict=predict_by_layers(logistic_layers),
    cost=logistic_cost,
    axes=("C", "class_weight", "banded"),
    open_ended=("C",),
    grid={"C": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e3)},
    path_axis="C",
    inputs=("each", "all"),
    tasks=("single", "multi"),
    layers=logistic_layers,
    # The features, a rotated copy and, while that is made, a scaled one. Copies for each fold, at
    # most 512 MB for few rows or many-class heads, are taken from the half of the memory that
    # `worker_memory` leaves.
    copies_of_features=3,
    uses_gpu=True,
    takes_side_columns=True,
)

RIDGE = HeadKind(
    name="ridge",
    summary="Ridge classification or regression",
    spec=RidgeSpec,
    fit=fit_ridge,
    predict=predict_by_layers(ridge_layers),
    cost=ridge_cost,
    axes=("alpha", "class_weight", "banded"),
    open_ended=("alpha",),
    grid={"alpha": (0.1, 1.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5)},
    path_axis="alpha",
    inputs=("each", "all"),
    layers=ridge_layers,
    takes_side_columns=True,
)
