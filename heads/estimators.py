"""scikit-learn's faces of the banks: one head on NumPy arrays, for a notebook, a pipeline or a comparison.

Each is a bank of one spec trained on all rows. `spec_` and `arrays_` are what `predict_head` and `save_head` take.
"""

from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from headrace.heads.folds import make_folds
from headrace.heads.predict import predict_head
from headrace.heads.spec import (
    FULL,
    CentroidSpec,
    ClassWeight,
    HeadFit,
    HeadSpec,
    KNNSpec,
    LogisticSpec,
    MLPSpec,
    RidgeSpec,
)
from headrace.heads.task import TRAIN_ONLY

Floats = npt.NDArray[Any]
ClassWeights = Literal["balanced"] | dict[Any, float] | None  # as in scikit-learn


class LogisticHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """L2-regularised logistic regression: `LogisticSpec`, by the exact batched solver, to a relative `gap` of the objective
    (by estimate; `gap_` is the proven bound). One head can afford a smaller one than a bank's 1e-5."""

    def __init__(
        self, C: float = 1.0, *, class_weight: ClassWeights = None, standardize: bool = True, gap: float = 1e-8
    ) -> None:
        self.C = C
        self.class_weight = class_weight
        self.standardize = standardize
        self.gap = gap

    def fit(self, X: Any, y: Any) -> Self:
        """X (N, D), y (N,) any labels. Raises ValueError for NaN, one class only, or shapes that do not fit."""
        from headrace.heads.logistic import fit_logistic_bank

        rows, target, classes = _checked(self, X, y)
        spec = LogisticSpec(self.C, _spec_weight(self.class_weight), self.standardize)
        fold = np.full(len(rows), TRAIN_ONLY, np.int16)
        weight = _sample_weight(self.class_weight, y)
        fits = fit_logistic_bank(
            rows, target, n_classes=len(classes), fold=fold, specs=[spec], sample_weight=weight, gap=self.gap
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

    def __init__(self, alpha: float = 1.0, *, class_weight: ClassWeights = None, standardize: bool = True) -> None:
        self.alpha = alpha
        self.class_weight = class_weight
        self.standardize = standardize

    def fit(self, X: Any, y: Any) -> Self:
        """X (N, D), y (N,) any labels. Raises ValueError for NaN, one class only, or shapes that do not fit."""
        from headrace.heads.ridge import fit_ridge_bank

        rows, target, classes = _checked(self, X, y)
        spec = RidgeSpec(self.alpha, _spec_weight(self.class_weight), self.standardize)
        fold = np.full(len(rows), TRAIN_ONLY, np.int16)
        weight = _sample_weight(self.class_weight, y)
        fits = fit_ridge_bank(rows, target, n_classes=len(classes), fold=fold, specs=[spec], sample_weight=weight)
        _finish(self, fits, classes)
        return self

    def predict_proba(self, X: Any) -> npt.NDArray[np.float32]:
        """(n, C) float32 pseudo-probabilities in the order of `classes_`: ridge has no likelihood."""
        return _probabilities(self, X)

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """(n,) labels."""
        return _labels(self, X)


class MLPHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A multi-layer perceptron: `MLPSpec`. With a validation fraction, the number of epochs is chosen on held-out rows
    and the network then trained on all rows for that many."""

    def __init__(
        self,
        hidden: tuple[int, ...] = (256,),
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
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

    def fit(self, X: Any, y: Any) -> Self:
        """X (N, D), y (N,) any labels. Raises ValueError for NaN, one class only, a bad parameter, or divergence."""
        from headrace.heads.mlp import fit_mlp_bank

        rows, target, classes = _checked(self, X, y)
        own = ("hidden", "learning_rate", "weight_decay", "dropout", "label_smoothing", "batch_size")
        rest = ("epochs", "patience", "seed", "standardize")
        values = {name: getattr(self, name) for name in own + rest}
        spec = MLPSpec(class_weight=_spec_weight(self.class_weight), **values)
        weight = _sample_weight(self.class_weight, y)
        fold = np.full(len(rows), TRAIN_ONLY, np.int16)
        if self.validation_fraction > 0:
            parts = make_folds(target, n_folds=max(2, round(1 / self.validation_fraction)), seed=self.seed)
            fold[parts == 0] = 0
        fits = fit_mlp_bank(
            rows, target, n_classes=len(classes), fold=fold, specs=[spec], sample_weight=weight, device=self.device
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

    def fit(self, X: Any, y: Any) -> Self:
        """X (N, D), y (N,) any labels. Raises ValueError for NaN, one class only, or shapes that do not fit."""
        from headrace.heads.neighbours import fit_knn_bank

        rows, target, classes = _checked(self, X, y)
        spec = KNNSpec(min(self.k, len(rows)), self.metric, self.weighting)  # type: ignore[arg-type]
        fold = np.full(len(rows), TRAIN_ONLY, np.int16)
        _finish(self, fit_knn_bank(rows, target, n_classes=len(classes), fold=fold, specs=[spec]), classes)
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

    def fit(self, X: Any, y: Any) -> Self:
        """X (N, D), y (N,) any labels. Raises ValueError for NaN, one class only, or shapes that do not fit."""
        from headrace.heads.neighbours import fit_centroid_bank

        rows, target, classes = _checked(self, X, y)
        spec = CentroidSpec(self.metric)  # type: ignore[arg-type]
        fold = np.full(len(rows), TRAIN_ONLY, np.int16)
        _finish(self, fit_centroid_bank(rows, target, n_classes=len(classes), fold=fold, specs=[spec]), classes)
        return self

    def predict_proba(self, X: Any) -> npt.NDArray[np.float32]:
        """(n, C) float32 probabilities in the order of `classes_`."""
        return _probabilities(self, X)

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """(n,) labels."""
        return _labels(self, X)


def _checked(head: BaseEstimator, X: Any, y: Any) -> tuple[Floats, npt.NDArray[np.int64], npt.NDArray[Any]]:
    rows, labels = validate_data(head, X, y, dtype=(np.float32, np.float64))
    check_classification_targets(labels)
    classes, target = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"{type(head).__name__} needs samples of at least 2 classes, found one class: {classes[0]}")
    return rows, target.astype(np.int64), classes


def _spec_weight(class_weight: ClassWeights) -> ClassWeight:
    return "balanced" if class_weight == "balanced" else "none"


def _sample_weight(class_weight: ClassWeights, y: Any) -> npt.NDArray[np.float64] | None:
    """Weights per class as the user gave them become weights of rows; None where the spec says it all."""
    return compute_sample_weight(class_weight, y) if isinstance(class_weight, dict) else None


def _finish(head: Any, fits: list[HeadFit], classes: npt.NDArray[Any]) -> None:
    fit = next(fit for fit in fits if fit.fold == FULL)
    if fit.error is not None:
        raise ValueError(f"{type(head).__name__}: {fit.error}")
    head.classes_, head.spec_, head.arrays_, head.n_iter_ = classes, fit.spec, fit.arrays, max(1, fit.iterations)


def _probabilities(head: Any, X: Any) -> npt.NDArray[np.float32]:
    check_is_fitted(head)
    spec: HeadSpec = head.spec_
    return predict_head(spec, head.arrays_, validate_data(head, X, dtype=(np.float32, np.float64), reset=False))


def _labels(head: Any, X: Any) -> npt.NDArray[Any]:
    predicted = _probabilities(head, X)
    return np.asarray(head.classes_[predicted.argmax(1)])
