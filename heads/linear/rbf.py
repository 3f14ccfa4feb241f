"""A support vector machine with a Gaussian kernel, fast for many features.

scikit-learn's `SVC(kernel="rbf")` computes a dot product per pair of rows. Here the kernel is one
matrix product, many times faster for 1,500 rows of 12,000 features, with the same result.
"""

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.svm import SVC
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from headrace.heads.arrays import Array, Doubles


class RBFClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Support vector classifier with the kernel exp(-gamma |x - z|² / D), D the number of features.

    Because of D, one gamma suits any number of features; scikit-learn's gamma is gamma / D. C and
    class_weight are those of SVC.
    """

    def __init__(self, C: float = 10.0, gamma: float = 0.5, class_weight: Any = None) -> None:
        self.C, self.gamma, self.class_weight = C, gamma, class_weight

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit on X (N, D) float and y (N,) class labels; sample_weight: (N,) or None."""
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self._training_rows = X
        svc = SVC(C=self.C, kernel="precomputed", class_weight=self.class_weight)
        self._svc = svc.fit(self._kernel(X), y, sample_weight=sample_weight)
        self.classes_ = svc.classes_
        return self

    def decision_function(self, X: Any) -> Doubles:
        """Return decisions (n,) for two classes, (n, classes) for more, of X (n, D)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return np.asarray(self._svc.decision_function(self._kernel(X)))

    def predict(self, X: Any) -> Array:
        """Return class labels (n,) of X (n, D)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return np.asarray(self._svc.predict(self._kernel(X)))

    def _kernel(self, X: Array) -> Doubles:
        """Return (n, N) kernel values of the rows X against the training rows."""
        training_rows = self._training_rows
        squares, training_squares = (
            np.einsum("ij,ij->i", rows, rows, dtype=np.float64) for rows in (X, training_rows)
        )
        products = (X @ training_rows.T).astype(np.float64)
        distances = squares[:, None] + training_squares[None] - 2 * products
        return np.asarray(np.exp(-self.gamma / X.shape[1] * np.maximum(distances, 0)))
