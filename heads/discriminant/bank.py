"""Banks of linear discriminant heads: every shrinkage of a fold from one eigendecomposition.

N rows, D features, C classes, A shrinkages, r eigenvectors, n training rows of a fold.

A class k with prior p_k and mean m_k has the decision function x' V m_k - m_k' V m_k / 2 + log p_k.
V is the inverse of the shrunk covariance (1 - s) S + s tr(S) / D I; S is the covariance of the
training rows around the means of their classes (Hastie, Tibshirani and Friedman 2009, sections
4.3.1 and 4.3.2). With S = Q diag(e) Q' the shrunk covariance has the eigenvalues (1 - s) e +
s mean(e) and the same eigenvectors, so each shrinkage costs only 2 D r C flops.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.linalg

from headrace.heads.arrays import Array, Arrays
from headrace.heads.data.checks import check_rows, check_specs
from headrace.heads.data.fold_coordinates import FoldCoordinates, fold_coordinates, fold_moments
from headrace.heads.data.standardize import Moments, chunks, scaled
from headrace.heads.data.task import REFIT
from headrace.heads.data.training_data import TrainingData
from headrace.heads.discriminant.kind import LDASpec
from headrace.heads.layers import ROWS_AT_ONCE, linear_layers, predict_dense
from headrace.heads.linear.gram import Products, group_products, sum_products
from headrace.heads.link import ABSENT_CLASS_DECISION
from headrace.heads.spec import FitResult, specs_by


def fit_discriminant_bank(
    data: TrainingData, specs: Sequence[LDASpec], *, refit: bool = True
) -> list[FitResult]:
    """Fit every shrinkage on the training rows of every fold, and on all rows when `refit`.

    data: X (N, D) float, no test rows, in memory or streamed; single-label target (N,). Sample
    weights count in priors, means and covariance, not in the standardization.

    The arrays of a head are weight (C, D) and bias (C,), float32, for raw features; a class without
    training rows has probability 0. Heads are ordered by spec, then by fold, REFIT last.

    Raises ValueError for NaN or infinite features, shapes that do not fit, and a shrinkage outside
    0..1.
    """
    check_specs(specs, "LDASpec(shrinkage=0.1)")
    check_rows(data)
    for spec in specs:
        if not 0 <= spec.shrinkage <= 1:
            raise ValueError(f"shrinkage must lie in 0..1, found {spec.shrinkage}")
    problem = DiscriminantProblem(data, fold_moments(data))
    folds = data.folds_to_fit(refit=refit)
    results: dict[tuple[int, int], FitResult] = {}
    for fold in folds:
        for (standardize,), spec_indices in specs_by(specs, "standardize").items():
            started = time.perf_counter()
            scatter = problem.scatter(fold, standardize=standardize)
            for i in spec_indices:
                weight, bias = scatter.coefficients(specs[i].shrinkage)
                arrays = {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}
                validation = None if fold == REFIT else _predict_held_out(data, fold, arrays)
                results[i, fold] = FitResult(
                    specs[i], fold, arrays, iterations=1, validation=validation
                )
            seconds = (time.perf_counter() - started) / len(spec_indices)
            for i in spec_indices:
                results[i, fold] = dataclasses.replace(results[i, fold], seconds=seconds)
    return [results[i, fold] for i in range(len(specs)) for fold in folds]


@dataclass(frozen=True)
class ClassScatter:
    """Class means and the decomposed covariance of a fold's training rows.

    They are in coordinates z: a raw row x is (x - center) * inverse_scale, then `coordinates.rows`.
    """

    center: Array  # (D,) raw
    inverse_scale: Array  # (D,)
    coordinates: FoldCoordinates
    class_means: Array  # (C, D) in z; 0 for a class without rows
    priors: Array  # (C,)
    eigenvalues: Array  # (r,), at least 0
    eigenvectors: Array  # (D, r)

    def coefficients(self, shrinkage: float) -> tuple[Array, Array]:
        """Return weight (C, D) and bias (C,) float64 of a head, for raw features."""
        n_features = len(self.center)
        # tr(S) / D: directions in which S is 0 count too.
        mean_eigenvalue = float(self.eigenvalues.sum()) / n_features
        shrunk = (1 - shrinkage) * self.eigenvalues + shrinkage * mean_eigenvalue
        # Pseudo-inverse of a singular covariance: eigenvalues that are 0 up to rounding stay 0.
        floor = shrunk.max(initial=0.0) * n_features * np.finfo(np.float64).eps
        inverse = np.where(shrunk > floor, 1.0 / np.where(shrunk > floor, shrunk, 1.0), 0.0)
        inverse_outside = 0.0
        outside = shrinkage * mean_eigenvalue  # eigenvalue of all directions not in `eigenvectors`
        if self.eigenvectors.shape[1] < n_features and outside > floor:
            inverse_outside = 1.0 / outside
            inverse -= inverse_outside
        projected = self.class_means @ self.eigenvectors
        weight = (projected * inverse) @ self.eigenvectors.T + inverse_outside * self.class_means
        present = self.priors > 0
        bias = np.log(np.where(present, self.priors, 1.0))
        bias -= 0.5 * np.einsum("kd,kd->k", weight, self.class_means)
        raw_weight = self.coordinates.common_weights(weight) * self.inverse_scale
        return raw_weight, np.where(present, bias - raw_weight @ self.center, ABSENT_CLASS_DECISION)


@dataclass(frozen=True)
class DiscriminantProblem:
    """The rows of a bank, their moments, and the products of their groups."""

    data: TrainingData
    scaling: dict[int, Moments]  # {fold: moments of its training rows}
    # {group of rows: products}, filled when first needed
    products: dict[int, Products] = field(default_factory=dict)

    def scatter(self, fold: int, *, standardize: bool) -> ClassScatter:
        """Return the class means and the decomposed covariance of a fold."""
        data, common, fold_moments = self.data, self.scaling[REFIT], self.scaling[fold]
        # S has rank n at most: the n x n products of rows with rows have its nonzero eigenvalues.
        if fold_moments.count < data.X.shape[1]:
            return self._scatter_of_few_rows(fold, fold_moments, standardize=standardize)
        inverse_scale = common.inverse_scale
        if not self.products:
            one_hot = (data.target[:, None] == np.arange(data.n_outputs)).astype(np.int8)
            rows = data.X, one_hot, data.sample_weight, data.fold
            self.products.update(group_products(*rows, common))
        products = sum_products(part for group, part in self.products.items() if group != fold)
        # These convert from the coordinates that all folds share to the fold's own.
        coordinates = fold_coordinates(
            fold_moments,
            common,
            fold_moments.scale if standardize else 1.0,
            common.scale,
            constant_ratio=np.inf,
        )
        mean = products.feature_sum / products.total_weight
        counts = np.maximum(products.target_sum, np.finfo(np.float64).tiny)
        class_means = np.where(
            products.target_sum[:, None] > 0, products.cross.T / counts[:, None] - mean, 0.0
        )
        between = (class_means * products.target_sum[:, None]).T @ class_means
        covariance = (products.centred().gram - between) / products.total_weight
        values, vectors = scipy.linalg.eigh(
            coordinates.rows(coordinates.rows(covariance).T), driver="evd", check_finite=False
        )
        center = common.mean + mean * common.scale
        return ClassScatter(
            center,
            inverse_scale,
            coordinates,
            coordinates.rows(class_means),
            products.target_sum / products.total_weight,
            np.maximum(values, 0.0),
            vectors,
        )

    def _scatter_of_few_rows(
        self, fold: int, fold_moments: Moments, *, standardize: bool
    ) -> ClassScatter:
        """Do as `scatter` for fewer rows than features, from products of rows with rows."""
        data = self.data
        rows = data.training_rows(fold)
        scale = fold_moments.scale if standardize else np.ones(len(fold_moments.mean))
        inverse_scale = np.where(fold_moments.constant, 0.0, 1.0 / scale)
        coordinates = fold_coordinates(fold_moments, fold_moments, scale, scale)
        weight = np.ones(len(rows)) if data.sample_weight is None else data.sample_weight[rows]
        Z = scaled(data.X[rows], fold_moments.mean, inverse_scale)
        one_hot = (data.target[rows, None] == np.arange(data.n_outputs)) * weight[:, None]
        class_weights, total_weight = one_hot.sum(0), float(weight.sum())
        mean = weight @ Z / total_weight
        Z = coordinates.rows(Z - mean)
        counts = np.maximum(class_weights, np.finfo(np.float64).tiny)
        class_means = (one_hot.T @ Z) / counts[:, None]
        Z -= class_means[data.target[rows]]
        Z *= np.sqrt(weight / total_weight)[:, None]
        # The scatter Z'Z (D, D) has the eigenvalues of Z Z' (n, n), and its eigenvectors are Z'v.
        values, vectors = scipy.linalg.eigh(Z @ Z.T, driver="evd", check_finite=False)
        # Smaller eigenvalues are rounding errors of the largest.
        in_span = values > values.max(initial=0.0) * len(Z) * np.finfo(np.float64).eps
        values, vectors = values[in_span], vectors[:, in_span]
        return ClassScatter(
            fold_moments.mean + mean * scale,
            inverse_scale,
            coordinates,
            class_means,
            class_weights / total_weight,
            values,
            Z.T @ vectors / np.sqrt(values),
        )


def _predict_held_out(data: TrainingData, fold: int, arrays: Arrays) -> Array:
    """Return the probabilities of a fold's held-out rows, (n, C) float32."""
    layers = linear_layers(arrays)
    # In chunks, because streamed rows are read as they are indexed.
    return np.concatenate(
        [
            predict_dense(layers, data.X[rows], data.task_kind, 1.0)
            for rows in chunks(data.held_out_rows(fold), ROWS_AT_ONCE)
        ]
    )
