"""Single heads as scikit-learn estimators on NumPy arrays.

Each is a bank of one spec trained on all rows; `predict_head` and `save_head` take its `spec_` and
`arrays_`. The fields of a class are its parameters. N training rows, n rows to predict, D features,
C classes, T targets of a regression.

`sample_weight` is the weight of each row in the loss; a row of weight 0 is left out. The means and
scales of the standardization are unweighted, as with a StandardScaler before a weighted estimator.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from headrace.heads.arrays import Array, Doubles, Floats
from headrace.heads.data.checks import row_weights
from headrace.heads.data.folds import make_folds
from headrace.heads.data.task import REFIT, TRAIN_ONLY
from headrace.heads.data.training_data import TrainingData
from headrace.heads.kind import FitOptions
from headrace.heads.kinds import HEAD_KINDS
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.neighbors.kind import CentroidSpec, KNNSpec
from headrace.heads.networks.kind import WEIGHT_DECAY, MLPSpec
from headrace.heads.predict import predict_head
from headrace.heads.spec import ClassWeight, FitResult, HeadSpec

ClassWeights = Literal["balanced"] | dict[Any, float] | None  # as in scikit-learn
# float32 stays float32, in which heads are trained: a copy in float64 would take twice the memory.
_DTYPES = (np.float32, np.float64)


class _Head(BaseEstimator):  # type: ignore[misc]
    """Base of all heads: a bank of one spec, trained on all rows."""

    def _spec(self, n_rows: int) -> HeadSpec:
        """Return the spec of the parameters."""
        raise NotImplementedError

    def _folds(self, target: Array) -> npt.NDArray[np.int16]:
        """Return the fold of each row, (N,): 0 for rows that decide about early stopping."""
        fold = np.full(len(target), TRAIN_ONLY, np.int16)
        fraction = getattr(self, "validation_fraction", 0)
        if fraction > 0:
            n_parts, seed = max(2, round(1 / fraction)), self.seed
            if target.ndim == 1:
                fold[make_folds(target, n_folds=n_parts, seed=seed) == 0] = 0
            else:
                fold[np.random.default_rng(seed).permutation(len(target)) % n_parts == 0] = 0
        return fold

    def _rows(self, X: Any) -> Array:
        """Return X (n, D) for prediction. Raises ValueError for another D, or before `fit`."""
        check_is_fitted(self)
        return np.asarray(validate_data(self, X, dtype=_DTYPES, reset=False))

    def _fit_bank(self, data: TrainingData, spec: HeadSpec) -> list[FitResult]:
        options = FitOptions(device=getattr(self, "device", "cpu"), n_threads=None)
        return HEAD_KINDS[spec.kind].fit(data, [spec], options)

    def _train(self, data: TrainingData) -> FitResult:
        """Train the head and set the fitted attributes. Raises ValueError if it has failed."""
        spec = self._spec(len(data.target))
        result = next(fit for fit in self._fit_bank(data, spec) if fit.fold == REFIT)
        if result.error is not None:
            raise ValueError(f"{type(self).__name__}: {result.error}")
        self.spec_, self.arrays_ = result.spec, result.arrays
        self.n_iter_ = max(1, result.iterations)
        return result


class _Classifier(ClassifierMixin, _Head):  # type: ignore[misc]
    """A head that predicts one class for each row."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on X (N, D), y (N,) any labels, sample_weight (N,).

        Raises ValueError for NaN, a single class, a bad parameter, or shapes that do not fit.
        """
        rows, labels = validate_data(self, X, y, dtype=_DTYPES)
        check_classification_targets(labels)
        weight = _checked_weights(sample_weight, len(rows))
        if weight is not None:
            rows, labels, weight = rows[weight > 0], labels[weight > 0], weight[weight > 0]
        classes, target = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"{type(self).__name__} needs samples of at least 2 classes, found one class: "
                f"{classes[0]}"
            )
        class_weight = getattr(self, "class_weight", None)
        if isinstance(class_weight, dict):  # specs have only "balanced" and "none"
            given = np.asarray(compute_sample_weight(class_weight, labels), np.float64)
            weight = given if weight is None else given * weight
        target = target.astype(np.int64)
        data = TrainingData(rows, target, self._folds(target), len(classes), sample_weight=weight)
        self._train(data)
        self.classes_ = classes
        return self

    def predict_proba(self, X: Any) -> Floats:
        """Return the probabilities (n, C), float32, in the order of `classes_`.

        Those of ridge heads, which have no likelihood, are pseudo-probabilities; those of nearest
        neighbours are shares of votes.
        """
        rows = self._rows(X)
        return predict_head(self.spec_, self.arrays_, rows)

    def predict(self, X: Any) -> Array:
        """Return the predicted labels, (n,)."""
        # First, for it says that the head is not fitted: then there are no `classes_`.
        probabilities = self.predict_proba(X)
        return np.asarray(self.classes_[probabilities.argmax(1)])


class _LinearClassifier(_Classifier):
    """A classifier with the decision function X @ coef_.T + intercept_."""

    # With two classes, the decision is this times the difference of their scores.
    _BINARY_SCALE: float

    @property
    def coef_(self) -> Doubles:
        """Coefficients for raw features: (1, D) for two classes, (C, D) for more."""
        check_is_fitted(self)
        return self._decisions(self.arrays_["weight"])

    @property
    def intercept_(self) -> Doubles:
        """Intercepts: (1,) for two classes, (C,) for more."""
        check_is_fitted(self)
        return self._decisions(self.arrays_["bias"])

    def decision_function(self, X: Any) -> Doubles:
        """Return the decision function: (n,) for two classes, positive for the second; (n, C) for
        more, of which the largest is predicted.
        """
        rows = self._rows(X).astype(np.float64)
        decisions: Doubles = rows @ self.coef_.T + self.intercept_
        return decisions[:, 0] if len(self.classes_) == 2 else decisions

    def _decisions(self, values: Array) -> Doubles:
        values = values.astype(np.float64)
        return self._BINARY_SCALE * (values[1:] - values[:1]) if len(values) == 2 else values


class _Regressor(RegressorMixin, _Head):  # type: ignore[misc]
    """A head that predicts one number or several for each row."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on X (N, D), y (N,) or (N, T) numbers, sample_weight (N,).

        Raises ValueError for NaN, a bad parameter, divergence, or shapes that do not fit.
        """
        rows, target = validate_data(self, X, y, dtype=_DTYPES, multi_output=True, y_numeric=True)
        self.n_outputs_, self.flat_ = 1 if target.ndim == 1 else target.shape[1], target.ndim == 1
        target = np.asarray(target.reshape(len(rows), -1), np.float64)
        weight = _checked_weights(sample_weight, len(rows))
        if weight is not None:
            rows, target, weight = rows[weight > 0], target[weight > 0], weight[weight > 0]
        fold = self._folds(target)
        self._train(TrainingData(rows, target, fold, target.shape[1], "regression", weight))
        return self

    def predict(self, X: Any) -> Doubles:
        """Return the predicted numbers, (n,) or (n, T) like the y of `fit`."""
        rows = self._rows(X)
        # In float64: in float32 a row's last digit depends on the other rows of the batch.
        arrays = {name: value.astype(np.float64) for name, value in self.arrays_.items()}
        values = np.asarray(predict_head(self.spec_, arrays, rows, "regression"), np.float64)
        return values[:, 0] if self.flat_ else values

    def __sklearn_tags__(self) -> Any:
        """Return the tags, which allow several targets."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


# Estimators are compared by identity, and scikit-learn's repr shows what differs from the defaults.
@dataclass(eq=False, repr=False)
class _Perceptron(_Head):
    """Base of the two multi-layer perceptrons."""

    hidden: tuple[int, ...] = (256,)
    _: KW_ONLY
    learning_rate: float = 1e-3
    weight_decay: float = WEIGHT_DECAY
    dropout: float = 0.0
    batch_size: int = 256
    epochs: int = 50
    patience: int = 8
    validation_fraction: float = 0.0
    seed: int = 0
    standardize: bool = True
    device: str = "cpu"

    def _spec(self, n_rows: int) -> HeadSpec:
        names = ("hidden", "learning_rate", "weight_decay", "dropout", "batch_size", "epochs")
        settings = {name: getattr(self, name) for name in (*names, "patience", "seed")}
        return MLPSpec(
            label_smoothing=getattr(self, "label_smoothing", 0.0),
            class_weight=_spec_weight(getattr(self, "class_weight", None)),
            standardize=self.standardize,
            **settings,
        )


@dataclass(eq=False, repr=False)
class LogisticHead(_LinearClassifier):
    """L2-regularized logistic regression: `LogisticSpec`, by the exact batched solver.

    gap: estimated relative distance of the objective from its optimum at which the solver stops;
    `gap_` is the proven bound. Smaller than a bank's 1e-5, because it is for one head only.
    """

    _BINARY_SCALE = 1.0  # the difference of the scores is the log-odds

    C: float = 1.0
    _: KW_ONLY
    class_weight: ClassWeights = None
    standardize: bool = True
    gap: float = 1e-8

    def _spec(self, n_rows: int) -> HeadSpec:
        return LogisticSpec(self.C, _spec_weight(self.class_weight), self.standardize)

    def _fit_bank(self, data: TrainingData, spec: Any) -> list[FitResult]:
        from headrace.heads.linear.logistic import fit_logistic_bank

        return fit_logistic_bank(data, [spec], gap=self.gap)

    def _train(self, data: TrainingData) -> FitResult:
        result = super()._train(data)
        self.gap_ = result.gap
        return result


@dataclass(eq=False, repr=False)
class RidgeHead(_LinearClassifier):
    """Ridge regression on -1/+1 targets: `RidgeSpec`, in closed form."""

    _BINARY_SCALE = 0.5  # the two classes' scores are each other's negatives

    alpha: float = 1.0
    _: KW_ONLY
    class_weight: ClassWeights = None
    standardize: bool = True

    def _spec(self, n_rows: int) -> HeadSpec:
        return RidgeSpec(self.alpha, _spec_weight(self.class_weight), self.standardize)


@dataclass(eq=False, repr=False)
class MLPHead(_Perceptron, _Classifier):
    """A multi-layer perceptron: `MLPSpec`.

    validation_fraction: share of the rows on which the number of epochs is chosen; the network is
    then trained on all rows for as many. 0: `epochs` epochs.
    """

    _: KW_ONLY
    label_smoothing: float = 0.0
    class_weight: ClassWeights = None


@dataclass(eq=False, repr=False)
class KNNHead(_Classifier):
    """k nearest neighbours: `KNNSpec`. If there are fewer than k rows, all of them vote."""

    k: int = 5
    _: KW_ONLY
    metric: str = "cosine"
    weighting: str = "uniform"

    def _spec(self, n_rows: int) -> HeadSpec:
        return KNNSpec(min(self.k, n_rows), self.metric, self.weighting)  # type: ignore[arg-type]


@dataclass(eq=False, repr=False)
class CentroidHead(_Classifier):
    """Nearest class mean: `CentroidSpec`."""

    metric: str = "cosine"

    def _spec(self, n_rows: int) -> HeadSpec:
        return CentroidSpec(self.metric)  # type: ignore[arg-type]


@dataclass(eq=False, repr=False)
class RidgeRegressionHead(_Regressor):
    """Ridge regression of one number or several: `RidgeSpec`, in closed form."""

    alpha: float = 1.0
    _: KW_ONLY
    standardize: bool = True

    @property
    def coef_(self) -> Doubles:
        """Coefficients for raw features: (D,) or (T, D), like the y of `fit`."""
        check_is_fitted(self)
        weight = self.arrays_["weight"].astype(np.float64)
        return weight[0] if self.flat_ else weight

    @property
    def intercept_(self) -> Any:
        """Intercepts: a number or (T,), like the y of `fit`."""
        check_is_fitted(self)
        bias = self.arrays_["bias"].astype(np.float64)
        return float(bias[0]) if self.flat_ else bias

    def _spec(self, n_rows: int) -> HeadSpec:
        return RidgeSpec(self.alpha, standardize=self.standardize)


@dataclass(eq=False, repr=False)
class MLPRegressionHead(_Perceptron, _Regressor):
    """A multi-layer perceptron for regression: `MLPSpec`, trained on the mean squared error of
    standardized targets.
    """


def _checked_weights(sample_weight: Any, n: int) -> Doubles | None:
    """Return the weights (n,), None for None. Raises ValueError if they do not fit or are all 0."""
    if sample_weight is None:
        return None
    weights = np.asarray(sample_weight, np.float64)
    if weights.shape != (n,):
        raise ValueError(
            f"sample_weight has the shape {weights.shape}, expected ({n},): one weight for each "
            "row of X"
        )
    weights = row_weights(weights, n)
    if not weights.any():
        raise ValueError(
            "every sample weight is zero, so that no row is left to train on: give some rows a "
            "weight"
        )
    return weights


def _spec_weight(class_weight: ClassWeights) -> ClassWeight:
    return "balanced" if class_weight == "balanced" else "none"
