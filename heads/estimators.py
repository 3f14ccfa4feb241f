"""scikit-learn's faces of the banks: one head on NumPy arrays, for a notebook, a pipeline or a
comparison.

Each is a bank of one spec trained on all rows. `spec_` and `arrays_` are what `predict_head` and
`save_head` take.

`sample_weight` is how much each row counts in the loss, as the banks have it; a row of weight 0 is
left out. The means and scales of standardisation are those of the rows, not weighted: as a
StandardScaler before a weighted estimator.
"""

from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from headrace.heads.data.checks import row_weights
from headrace.heads.data.folds import make_folds
from headrace.heads.data.task import REFIT, TRAIN_ONLY
from headrace.heads.data.training_data import TrainingData
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.neighbors.kind import CentroidSpec, KNNSpec
from headrace.heads.networks.kind import WEIGHT_DECAY, MLPSpec
from headrace.heads.predict import predict_head
from headrace.heads.spec import ClassWeight, FitResult, HeadSpec

Floats = npt.NDArray[Any]
ClassWeights = Literal["balanced"] | dict[Any, float] | None  # as in scikit-learn


class LogisticHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """L2-regularised logistic regression: `LogisticSpec`, by the exact batched solver, to a
    relative `gap` of the objective (by estimate; `gap_` is the proven bound). One head can afford a
    smaller one than a bank's 1e-5.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        class_weight: ClassWeights = None,
        standardize: bool = True,
        gap: float = 1e-8,
    ) -> None:
        self.C = C
        self.class_weight = class_weight
        self.standardize = standardize
        self.gap = gap

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """X (N, D), y (N,) any labels, sample_weight (N,).

        Raises ValueError for NaN, one class only, or shapes that do not fit.
        """
        from headrace.heads.linear.logistic import fit_logistic_bank

        rows, target, classes, counts = _checked(self, X, y, sample_weight)
        spec = LogisticSpec(self.C, _spec_weight(self.class_weight), self.standardize)
        fold = np.full(len(rows), TRAIN_ONLY, np.int16)
        weight = _weights(self.class_weight, classes, target, counts)
        fits = fit_logistic_bank(
            TrainingData(rows, target, fold, len(classes), sample_weight=weight),
            [spec],
            gap=self.gap,
        )
        _finish(self, fits, classes)
        self.gap_ = fits[-1].gap
        return self

    def predict_proba(self, X: Any) -> npt.NDArray[np.float32]:
        """(n, C) float32 probabilities in the order of `classes_`."""
        return _probabilities(self, X)

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """(n,) labels."""
        return _labels(self, X)


class RidgeHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Ridge regression on -1/+1 targets: `RidgeSpec`, in closed form."""

    def __init__(
        self, alpha: float = 1.0, *, class_weight: ClassWeights = None, standardize: bool = True
    ) -> None:
        self.alpha = alpha
        self.class_weight = class_weight
        self.standardize = standardize

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """X (N, D), y (N,) any labels, sample_weight (N,).

        Raises ValueError for NaN, one class only, or shapes that do not fit.
        """
        from headrace.heads.linear.ridge import fit_ridge_bank

        rows, target, classes, counts = _checked(self, X, y, sample_weight)
        spec = RidgeSpec(self.alpha, _spec_weight(self.class_weight), self.standardize)
        fold = np.full(len(rows), TRAIN_ONLY, np.int16)
        weight = _weights(self.class_weight, classes, target, counts)
        fits = fit_ridge_bank(
            TrainingData(rows, target, fold, len(classes), sample_weight=weight), [spec]
        )
        _finish(self, fits, classes)
        return self

    def predict_proba(self, X: Any) -> npt.NDArray[np.float32]:
        """(n, C) float32 pseudo-probabilities in the order of `classes_`: ridge has no
        likelihood.
        """
        return _probabilities(self, X)

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """(n,) labels."""
        return _labels(self, X)


class MLPHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A multi-layer perceptron: `MLPSpec`.

    With a validation fraction, the number of epochs is chosen on held-out rows and the network then
    trained on all rows for that many.
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = (256,),
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = WEIGHT_DECAY,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        class_weight: ClassWeights = None,
        batch_size: int = 256,
        epochs: int = 50,
        patience: int = 8,
        validation_fraction: float = 0.0,
        seed: int = 0,
        standardize: bool = True,
        device: str = "cpu",
    ) -> None:
        self.hidden = hidden
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.label_smoothing = label_smoothing
        self.class_weight = class_weight
        self.batch_size = batch_size
        self.epochs = epochs
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.standardize = standardize
        self.device = device

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """X (N, D), y (N,) any labels, sample_weight (N,).

        Raises ValueError for NaN, one class only, a bad parameter, or divergence.
        """
        from headrace.heads.networks.mlp import fit_mlp_bank

        rows, target, classes, counts = _checked(self, X, y, sample_weight)
        own = (
            "hidden",
            "learning_rate",
            "weight_decay",
            "dropout",
            "label_smoothing",
            "batch_size",
        )
        rest = ("epochs", "patience", "seed", "standardize")
        values = {name: getattr(self, name) for name in own + rest}
        spec = MLPSpec(class_weight=_spec_weight(self.class_weight), **values)
        weight = _weights(self.class_weight, classes, target, counts)
        fold = np.full(len(rows), TRAIN_ONLY, np.int16)
        if self.validation_fraction > 0:
            parts = make_folds(
                target, n_folds=max(2, round(1 / self.validation_fraction)), seed=self.seed
            )
            fold[parts == 0] = 0
        fits = fit_mlp_bank(
            TrainingData(rows, target, fold, len(classes), sample_weight=weight),
            [spec],
            device=self.device,
        )
        _finish(self, fits, classes)
        return self

    def predict_proba(self, X: Any) -> npt.NDArray[np.float32]:
        """(n, C) float32 probabilities in the order of `classes_`."""
        return _probabilities(self, X)

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """(n,) labels."""
        return _labels(self, X)


class KNNHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """k nearest neighbours: `KNNSpec`. With fewer than k rows all of them vote."""

    def __init__(self, k: int = 5, *, metric: str = "cosine", weighting: str = "uniform") -> None:
        self.k = k
        self.metric = metric
        self.weighting = weighting

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """X (N, D), y (N,) any labels, sample_weight (N,).

        Raises ValueError for NaN, one class only, or shapes that do not fit.
        """
        from headrace.heads.neighbors.bank import fit_knn_bank

        rows, target, classes, counts = _checked(self, X, y, sample_weight)
        spec = KNNSpec(min(self.k, len(rows)), self.metric, self.weighting)  # type: ignore[arg-type]
        fold = np.full(len(rows), TRAIN_ONLY, np.int16)
        _finish(
            self,
            fit_knn_bank(
                TrainingData(rows, target, fold, len(classes), sample_weight=counts), [spec]
            ),
            classes,
        )
        return self

    def predict_proba(self, X: Any) -> npt.NDArray[np.float32]:
        """(n, C) float32 shares of the neighbours in the order of `classes_`."""
        return _probabilities(self, X)

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """(n,) labels."""
        return _labels(self, X)


class CentroidHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Nearest class mean: `CentroidSpec`."""

    def __init__(self, metric: str = "cosine") -> None:
        self.metric = metric

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """X (N, D), y (N,) any labels, sample_weight (N,).

        Raises ValueError for NaN, one class only, or shapes that do not fit.
        """
        from headrace.heads.neighbors.bank import fit_centroid_bank

        rows, target, classes, counts = _checked(self, X, y, sample_weight)
        spec = CentroidSpec(self.metric)  # type: ignore[arg-type]
        fold = np.full(len(rows), TRAIN_ONLY, np.int16)
        _finish(
            self,
            fit_centroid_bank(
                TrainingData(rows, target, fold, len(classes), sample_weight=counts), [spec]
            ),
            classes,
        )
        return self

    def predict_proba(self, X: Any) -> npt.NDArray[np.float32]:
        """(n, C) float32 probabilities in the order of `classes_`."""
        return _probabilities(self, X)

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """(n,) labels."""
        return _labels(self, X)


class RidgeRegressionHead(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Ridge regression of one number or several: `RidgeSpec`, in closed form."""

    def __init__(self, alpha: float = 1.0, *, standardize: bool = True) -> None:
        self.alpha = alpha
        self.standardize = standardize

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """X (N, D), y (N,) or (N, T) numbers, sample_weight (N,).

        Raises ValueError for NaN or shapes that do not fit.
        """
        from headrace.heads.linear.ridge import fit_ridge_bank

        rows, target, counts = _numbers(self, X, y, sample_weight)
        fold = np.full(len(rows), TRAIN_ONLY, np.int16)
        specs = [RidgeSpec(self.alpha, standardize=self.standardize)]
        fits = fit_ridge_bank(
            TrainingData(
                rows, target, fold, target.shape[1], task_kind="regression", sample_weight=counts
            ),
            specs,
        )
        _keep(self, fits)
        return self

    def predict(self, X: Any) -> npt.NDArray[np.float64]:
        """(n,) or (n, T) numbers, as y was."""
        return _values(self, X)

    def __sklearn_tags__(self) -> Any:
        """Several numbers at once are allowed."""
        return _several(super().__sklearn_tags__())


class MLPRegressionHead(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """A multi-layer perceptron for one number or several:

    `MLPSpec`, on the mean squared error of standardised targets.
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = (256,),
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = WEIGHT_DECAY,
        dropout: float = 0.0,
        batch_size: int = 256,
        epochs: int = 50,
        patience: int = 8,
        validation_fraction: float = 0.0,
        seed: int = 0,
        standardize: bool = True,
        device: str = "cpu",
    ) -> None:
        self.hidden = hidden
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.batch_size = batch_size
        self.epochs = epochs
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.standardize = standardize
        self.device = device

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """X (N, D), y (N,) or (N, T) numbers, sample_weight (N,).

        Raises ValueError for NaN, a bad parameter, or divergence.
        """
        from headrace.heads.networks.mlp import fit_mlp_bank

        rows, target, counts = _numbers(self, X, y, sample_weight)
        own = ("hidden", "learning_rate", "weight_decay", "dropout", "batch_size")
        rest = ("epochs", "patience", "seed", "standardize")
        spec = MLPSpec(**{name: getattr(self, name) for name in own + rest})
        fold = np.full(len(rows), TRAIN_ONLY, np.int16)
        if self.validation_fraction > 0:
            parts = max(2, round(1 / self.validation_fraction))
            fold[np.random.default_rng(self.seed).permutation(len(rows)) % parts == 0] = 0
        fits = fit_mlp_bank(
            TrainingData(
                rows, target, fold, target.shape[1], task_kind="regression", sample_weight=counts
            ),
            [spec],
            device=self.device,
        )
        _keep(self, fits)
        return self

    def predict(self, X: Any) -> npt.NDArray[np.float64]:
        """(n,) or (n, T) numbers, as y was."""
        return _values(self, X)

    def __sklearn_tags__(self) -> Any:
        """Several numbers at once are allowed."""
        return _several(super().__sklearn_tags__())


def _checked(
    head: BaseEstimator, X: Any, y: Any, sample_weight: Any
) -> tuple[Floats, npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[np.float64] | None]:
    """Rows, positions of their classes, the classes, and weights; without the rows of weight 0."""
    rows, labels = validate_data(head, X, y, dtype=(np.float32, np.float64))
    check_classification_targets(labels)
    counts = _counts(sample_weight, len(rows))
    if counts is not None:
        rows, labels, counts = rows[counts > 0], labels[counts > 0], counts[counts > 0]
    classes, target = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"{type(head).__name__} needs samples of at least 2 classes, found one class: "
            f"{classes[0]}"
        )
    return rows, target.astype(np.int64), classes, counts


def _numbers(
    head: Any, X: Any, y: Any, sample_weight: Any
) -> tuple[Floats, npt.NDArray[np.float64], npt.NDArray[np.float64] | None]:
    """Rows, targets (N, T), and weights; without the rows of weight 0."""
    rows, target = validate_data(
        head, X, y, dtype=(np.float32, np.float64), multi_output=True, y_numeric=True
    )
    head.n_outputs_, head.flat_ = 1 if target.ndim == 1 else target.shape[1], target.ndim == 1
    target = np.asarray(target.reshape(len(rows), -1), np.float64)
    counts = _counts(sample_weight, len(rows))
    return (
        (rows, target, counts)
        if counts is None
        else (rows[counts > 0], target[counts > 0], counts[counts > 0])
    )


def _counts(sample_weight: Any, n: int) -> npt.NDArray[np.float64] | None:
    """(n,) weights of which one at least is not 0; None where none are given."""
    if sample_weight is None:
        return None
    counts = np.asarray(sample_weight, np.float64)
    if counts.shape != (n,):
        raise ValueError(
            f"sample_weight has the shape {counts.shape}, expected ({n},): one weight for each row "
            "of X"
        )
    counts = row_weights(counts, n)
    if not counts.any():
        raise ValueError(
            "every sample weight is zero, so that no row is left to train on: give some rows a "
            "weight"
        )
    return counts


def _spec_weight(class_weight: ClassWeights) -> ClassWeight:
    return "balanced" if class_weight == "balanced" else "none"


def _weights(
    class_weight: ClassWeights,
    classes: npt.NDArray[Any],
    target: npt.NDArray[np.int64],
    counts: npt.NDArray[np.float64] | None,
) -> npt.NDArray[np.float64] | None:
    """Weights of rows; weights per class as the user gave them are multiplied in, for no spec says
    them.
    """
    if not isinstance(class_weight, dict):
        return counts
    own = np.asarray(compute_sample_weight(class_weight, classes[target]), np.float64)
    return own if counts is None else own * counts


def _finish(head: Any, fits: list[FitResult], classes: npt.NDArray[Any]) -> None:
    _keep(head, fits)
    head.classes_ = classes


def _keep(head: Any, fits: list[FitResult]) -> None:
    fit = next(fit for fit in fits if fit.fold == REFIT)
    if fit.error is not None:
        raise ValueError(f"{type(head).__name__}: {fit.error}")
    head.spec_, head.arrays_, head.n_iter_ = fit.spec, fit.arrays, max(1, fit.iterations)


def _values(head: Any, X: Any) -> npt.NDArray[np.float64]:
    check_is_fitted(head)
    rows = validate_data(head, X, dtype=(np.float32, np.float64), reset=False)
    # In float64, so that a row's last digit does not depend on the rows beside it.
    arrays = {name: value.astype(np.float64) for name, value in head.arrays_.items()}
    found = np.asarray(predict_head(head.spec_, arrays, rows, "regression"), np.float64)
    return found[:, 0] if head.flat_ else found


def _several(tags: Any) -> Any:
    tags.target_tags.multi_output = True
    return tags


def _probabilities(head: Any, X: Any) -> npt.NDArray[np.float32]:
    check_is_fitted(head)
    spec: HeadSpec = head.spec_
    return predict_head(
        spec, head.arrays_, validate_data(head, X, dtype=(np.float32, np.float64), reset=False)
    )


def _labels(head: Any, X: Any) -> npt.NDArray[Any]:
    predicted = _probabilities(head, X)
    return np.asarray(head.classes_[predicted.argmax(1)])
