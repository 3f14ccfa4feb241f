"""Nearest neighbours and nearest class means: their settings, and what banks ask of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Gt

from headrace.heads.arrays import Arrays, Floats
from headrace.heads.data.task import TaskKind
from headrace.heads.data.training_data import TrainingData
from headrace.heads.evaluate.temperature import vote_floor
from headrace.heads.kind import FitOptions, HeadKind
from headrace.heads.link import tempered
from headrace.heads.spec import FitResult, check_choices

# Seconds of one core for a multiply-add: in a product of all rows with all rows, which works in the
# cache, and in one with a few class means, which waits for memory. Measured on Zen 4 with 4,000 and
# 8,000 rows.
_SECONDS_WIDE_PRODUCT, _SECONDS_NARROW_PRODUCT = 6e-11, 2e-10
# Seconds of what a setting makes of the product of two rows. Twelve settings take 1.1 to 1.5 times
# as long as one.
_SECONDS_PER_PAIR = 1e-9


@dataclass(frozen=True)
class KNNSpec:
    """k nearest neighbours."""

    k: Annotated[int, Gt(0)]  # neighbours
    metric: Literal["cosine", "euclidean"] = "cosine"
    # distance: nearer neighbours count more
    weighting: Literal["uniform", "distance"] = "uniform"
    kind: Literal["knn"] = "knn"

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class CentroidSpec:
    """Nearest class mean, with probabilities by softmax of the scaled similarity."""

    metric: Literal["cosine", "euclidean"] = "cosine"
    kind: Literal["centroid"] = "centroid"

    def __post_init__(self) -> None:
        check_choices(self)


def fit_knn(data: TrainingData, specs: Sequence[Any], options: FitOptions) -> list[FitResult]:
    """Search the neighbours of all specs in one pass."""
    from headrace.heads.neighbors.bank import fit_knn_bank

    return fit_knn_bank(data, specs, refit=options.refit)


def fit_centroid(data: TrainingData, specs: Sequence[Any], options: FitOptions) -> list[FitResult]:
    """Take the class means of every fold."""
    from headrace.heads.neighbors.bank import fit_centroid_bank

    return fit_centroid_bank(data, specs, refit=options.refit)


def predict_neighbors(
    spec: Any, arrays: Arrays, X: Floats, task_kind: TaskKind, temperature: float
) -> Floats:
    """Return (n, C) shares of the neighbours of rows X (n, D); for regression their mean values."""
    from headrace.heads.neighbors.bank import predict_knn

    votes = predict_knn(spec, arrays, X)
    return tempered(votes, task_kind, temperature, vote_floor(task_kind, votes.shape[1]))


def predict_means(
    spec: Any, arrays: Arrays, X: Floats, task_kind: TaskKind, temperature: float
) -> Floats:
    """Return (n, C) probabilities of rows X (n, D)."""
    from headrace.heads.neighbors.bank import predict_centroid

    return predict_centroid(spec, arrays, X, temperature)


def knn_cost(
    spec: KNNSpec, n_rows: int, n_features: int, n_outputs: int, n_fits: int
) -> tuple[float, float]:
    """Estimate the seconds of a bank's one pass over the inner products of rows, and of the
    neighbours of a spec in it.
    """
    # For any number of folds: a row is searched for among those of the other folds, once.
    n_pairs = n_rows * n_rows
    return _SECONDS_WIDE_PRODUCT * n_pairs * n_features, _SECONDS_PER_PAIR * n_pairs


def centroid_cost(
    spec: CentroidSpec, n_rows: int, n_features: int, n_outputs: int, n_fits: int
) -> tuple[float, float]:
    """Estimate the seconds of shared work of a bank (none) and of products with class means."""
    return 0.0, n_fits * _SECONDS_NARROW_PRODUCT * n_rows * n_features * n_outputs


KNN = HeadKind(
    name="knn",
    summary="k nearest neighbours",
    spec=KNNSpec,
    fit=fit_knn,
    predict=predict_neighbors,
    cost=knn_cost,
    axes=("k", "metric", "weighting"),
    open_ended=("k",),
    grid={"k": (1, 5, 20)},
    input_array="features",
    copies_of_features=3,  # a centred copy, and the training rows of a fold
    counts_votes=lambda spec: True,
)

CENTROID = HeadKind(
    name="centroid",
    summary="Nearest class mean",
    spec=CentroidSpec,
    fit=fit_centroid,
    predict=predict_means,
    cost=centroid_cost,
    axes=("metric",),
    tasks=("single",),
    input_array="means",
)
