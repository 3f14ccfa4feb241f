"""The kind of head "lda": linear discriminant analysis."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from headrace.heads.arrays import Arrays
from headrace.heads.data.training_data import TrainingData
from headrace.heads.kind import FitOptions, HeadKind
from headrace.heads.layers import Layers, linear_layers, predict_by_layers
from headrace.heads.spec import FitResult, check_choices


@dataclass(frozen=True)
class LDASpec:
    """Linear discriminant analysis with shrinkage of the covariance.

    As scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)` after a
    StandardScaler, with the classes' shares as priors. The shrinkage s makes the pooled covariance
    (1 - s) S + s tr(S) / D I.
    """

    # share of the covariance that is replaced by one variance for all features; 0: none
    shrinkage: Annotated[float, Ge(0), Le(1)]
    standardize: bool = True
    kind: Literal["lda"] = "lda"

    def __post_init__(self) -> None:
        check_choices(self)


def fit_lda(data: TrainingData, specs: Sequence[Any], options: FitOptions) -> list[FitResult]:
    """Train a bank of specs."""
    from headrace.heads.discriminant.bank import fit_discriminant_bank

    return fit_discriminant_bank(data, specs, refit=options.refit)


def lda_layers(spec: LDASpec, arrays: Arrays) -> Layers:
    """Return the layer of a head, whose outputs are log-odds."""
    return linear_layers(arrays)


def lda_cost(
    spec: LDASpec, n_rows: int, n_features: int, n_outputs: int, n_fits: int
) -> tuple[float, float]:
    """Return (seconds that all specs share, seconds per spec): Gram matrices and decompositions,
    and products.
    """
    rank = min(n_rows, n_features)
    shared = 1.1e-10 * n_rows * n_features * rank + n_fits * 1e-9 * rank**3
    return shared, n_fits * 2e-10 * n_features * rank * n_outputs


LDA = HeadKind(
    name="lda",
    summary="Linear discriminant analysis",
    spec=LDASpec,
    fit=fit_lda,
    predict=predict_by_layers(lda_layers),
    cost=lda_cost,
    axes=("shrinkage",),
    grid={"shrinkage": (0.01, 0.03, 0.1, 0.3, 0.6, 0.9)},
    path_axis="shrinkage",
    inputs=("each", "all"),
    tasks=("single",),
    layers=lda_layers,
    takes_side_columns=True,
)
