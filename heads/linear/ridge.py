"""Banks of ridge heads in closed form: every strength and fold from one set of products.

N rows, D features, T target columns (classes, labels or values), n training rows of a fold, A
strengths.

A head minimizes  sum_i w_i |y_i - W z_i - b|^2 + alpha |W|^2  on features z standardized by its
training rows, the intercept unpenalized; classes are coded -1/+1, as in scikit-learn's
RidgeClassifier. With the products of the centred rows G = sum w z z' and B = sum w z y' the
solution is (G + alpha I) W = B. Standardization only scales G and B.

Many strengths share one eigendecomposition G = Q diag(e) Q', so each costs only 2 D^2 T flops; for
few strengths each has a Cholesky factorization. With n < D the same is done with the n x n matrix
K = Z Z' (W = Z' a, (K + alpha I) a = y).
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from headrace.heads.arrays import Array, Index
from headrace.heads.data.checks import check_rows, check_specs
from headrace.heads.data.fold_coordinates import FoldCoordinates, fold_coordinates, fold_moments
from headrace.heads.data.standardize import Features, Moments, chunks, scaled
from headrace.heads.data.task import REFIT, TaskKind
from headrace.heads.data.training_data import TrainingData
from headrace.heads.layers import ROWS_AT_ONCE
from headrace.heads.linear.bands import with_bands
from headrace.heads.linear.gram import Products, group_products, sum_products
from headrace.heads.linear.kind import RIDGE_LOG_ODDS, RidgeSpec
from headrace.heads.link import link
from headrace.heads.spec import FitResult, relative_gap, specs_by

# An eigendecomposition costs about as much as this many Cholesky factorizations (float64: 17 at D =
# 512, 20 at 1,280). At 5,000 x 512, 60 strengths take 2.6 times as long by Cholesky, 5 strengths
# 1.7 times as long by eigenvalues.
MIN_STRENGTHS_FOR_EIGENVALUES = 16
# Means of 100 standard deviations lose two of float32's seven digits, and another order of
# summation a third one.
MAX_OFFSET = 100.0


def fit_ridge_bank(
    data: TrainingData, specs: Sequence[RidgeSpec], *, refit: bool = True
) -> list[FitResult]:
    """Fit every spec on the training rows of every fold, and on all rows when `refit`.

    data: X (N, D) float, no test rows, in memory or streamed. Multi-label targets (N, L) are L
    independent problems.

    The arrays of a head are weight (T, D) and bias (T,), float32, for raw features; `validation`
    has probabilities, or the values of a regression. Heads are ordered by spec, then by fold, REFIT
    last.

    Raises ValueError for NaN or infinite features, shapes that do not fit, and negative strengths.
    """
    _check(data, specs)
    fold, sample_weight = np.asarray(data.fold, np.int64), data.weights
    plain_scaling = fold_moments(data)
    scalings = {False: plain_scaling}  # {RidgeSpec.banded: moments}
    if any(spec.banded for spec in specs):
        scalings[True] = with_bands(data, plain_scaling)
    folds = data.folds_to_fit(refit=refit)
    coded_target = _code_targets(data.target, data.n_outputs, data.task_kind)
    # {banded: {group of rows: products}}. All folds share them, unless balanced weights make the
    # weight of a row depend on the fold.
    shared_products: dict[bool, dict[int, Products]] = {False: {}, True: {}}
    results: dict[tuple[int, int], FitResult] = {}
    groups = specs_by(specs, "class_weight", "standardize", "banded")
    for (class_weight, standardize, banded), spec_indices in groups.items():
        balanced = class_weight == "balanced" and data.task_kind != "regression"
        problems = [list(range(data.n_outputs))]
        # Balanced weights differ from label to label, so each label is a problem of its own.
        if balanced and data.task_kind == "multi":
            problems = [[label] for label in range(data.n_outputs)]
        alphas = np.array([specs[i].alpha for i in spec_indices])
        for held_out in folds:
            began = time.perf_counter()
            solutions = []
            for columns in problems:
                weight, products = sample_weight, shared_products[banded]
                if balanced:
                    weight = _balanced_weights(data, columns, fold != held_out, sample_weight)
                    products = {}
                problem = _RidgeProblem(
                    data.X, coded_target[:, columns], weight, fold, scalings[banded], products
                )
                solutions.append(problem.solve(held_out, alphas, standardize=standardize))
            solution, common = _join_columns(solutions), scalings[banded][REFIT]
            heads = _fit_results(data, [specs[i] for i in spec_indices], held_out, solution, common)
            seconds = (time.perf_counter() - began) / len(spec_indices)
            for i, head in zip(spec_indices, heads, strict=True):
                results[i, held_out] = dataclasses.replace(head, seconds=seconds)
    return [results[i, held_out] for i in range(len(specs)) for held_out in folds]


def _fit_results(
    data: TrainingData,
    specs: Sequence[RidgeSpec],
    held_out: int,
    solution: "_RidgeSolution",
    common: Moments,  # of all rows
) -> list[FitResult]:
    """Return the heads of a fold for the specs of a solution, with held-out predictions."""
    weight = solution.weight * common.inverse_scale
    raw_weight = weight.astype(np.float32)
    raw_bias = (solution.bias - weight @ common.mean).astype(np.float32)
    validations: list[Array | None] = [None] * len(specs)
    if held_out != REFIT:
        scores = _scores(data.X, data.held_out_rows(held_out), raw_weight, raw_bias, common)
        validations = [link(head_scores, data.task_kind, RIDGE_LOG_ODDS) for head_scores in scores]
    return [
        FitResult(
            spec,
            held_out,
            {"weight": raw_weight[i], "bias": raw_bias[i]},
            float(solution.objective[i]),
            relative_gap(float(solution.objective[i]), float(solution.gap_bound[i])),
            iterations=1,
            validation=validations[i],
        )
        for i, spec in enumerate(specs)
    ]


@dataclass(frozen=True)
class _RidgeSolution:
    """Solutions for A strengths, float64, for features (x - mean of all rows) / (their scale)."""

    weight: Array  # (A, T, D)
    bias: Array  # (A, T)
    objective: Array  # (A,)
    gap_bound: Array  # (A,), at least objective - optimum


@dataclass(frozen=True)
class _RidgeProblem:
    """Rows, coded targets and weights of one problem."""

    X: Features  # (N, D)
    Y: Array  # (N, T)
    sample_weight: Array | None  # (N,)
    fold: Array  # (N,)
    scaling: dict[int, Moments]  # {fold: moments of its training rows}
    products: dict[int, Products]  # {group of rows: products}, filled when first needed

    def solve(self, held_out: int, alphas: Array, *, standardize: bool) -> _RidgeSolution:
        """Return the solutions of a fold for every strength."""
        common, moments = self.scaling[REFIT], self.scaling[held_out]
        # Coordinates in which weights are penalized. constant_ratio: a feature that is constant in
        # the fold's training rows gets no weight.
        scale = moments.scale if standardize else 1.0
        coordinates = fold_coordinates(moments, common, scale, common.scale, constant_ratio=np.inf)
        if moments.count < self.X.shape[1]:
            return self._solve_dual(held_out, alphas, coordinates)
        if not self.products:
            rows = self.X, self.Y, self.sample_weight, self.fold
            self.products.update(group_products(*rows, common))
        products = sum_products(
            products for group, products in self.products.items() if group != held_out
        )
        centred = products.centred()
        gram = coordinates.rows(coordinates.rows(centred.gram).T)
        cross = coordinates.rows(centred.cross.T).T
        W = _solve_shifted(gram, cross, alphas)  # (D, A, T)
        gram_W = (gram @ W.reshape(len(W), -1)).reshape(W.shape)
        residual = gram_W + alphas[:, None] * W - cross[:, None]
        objective = (
            centred.target_squares.sum()
            - np.einsum("dt,dat->a", cross, W)
            + np.einsum("dat,dat->a", residual, W)
        )
        gap_bound = np.einsum("dat,dat->a", residual, residual) / _strong_convexity(gram, alphas)
        weight = coordinates.common_weights(np.ascontiguousarray(W.transpose(1, 2, 0)))
        total_weight = products.total_weight or 1.0
        bias = products.target_sum / total_weight - weight @ (products.feature_sum / total_weight)
        return _RidgeSolution(weight, bias, objective, gap_bound)

    def _solve_dual(
        self, held_out: int, alphas: Array, coordinates: FoldCoordinates
    ) -> _RidgeSolution:
        """Do as `solve` for fewer rows than features: W = Z' a, (Z Z' + alpha I) a = y.

        Rows are multiplied by the root of their weight.
        """
        rows = np.flatnonzero(self.fold != held_out)
        weight_root = np.ones(len(rows))
        if self.sample_weight is not None:
            weight_root = np.sqrt(self.sample_weight[rows])
        total_weight = float(weight_root @ weight_root) or 1.0
        common = self.scaling[REFIT]
        Z = scaled(self.X[rows], common.mean, common.inverse_scale)
        mean, target_mean = (weight_root**2 @ values / total_weight for values in (Z, self.Y[rows]))
        Z = coordinates.rows((Z - mean) * weight_root[:, None])
        y = (self.Y[rows] - target_mean) * weight_root[:, None]
        kernel = Z @ Z.T
        a = _solve_shifted(kernel, y, alphas)  # (n, A, T)
        kernel_a = (kernel @ a.reshape(len(a), -1)).reshape(a.shape)
        errors = y[:, None] - kernel_a
        # The residual r of the dual equation; Z' r is the residual of the primal one.
        residual = errors - alphas[:, None] * a
        W = (Z.T @ a.reshape(len(a), -1)).reshape(-1, *a.shape[1:])
        objective = np.einsum("nat,nat->a", errors, errors) + alphas * np.einsum(
            "nat,nat->a", a, kernel_a
        )
        kernel_residual = (kernel @ residual.reshape(len(a), -1)).reshape(a.shape)
        # Objective - optimum is r' K (K + alpha I)^-1 r, and K (K + alpha I)^-1 is at most K /
        # alpha and at most I, so the smaller of two bounds is taken. If the rows are nearly
        # interpolated, the first one is too large by the condition number of K + alpha I.
        gap_bound = np.maximum(np.einsum("nat,nat->a", residual, kernel_residual), 0.0)
        gap_bound = np.minimum(
            gap_bound / _strong_convexity(kernel, alphas),
            np.einsum("nat,nat->a", residual, residual),
        )
        weight = coordinates.common_weights(np.ascontiguousarray(W.transpose(1, 2, 0)))
        bias = target_mean - weight @ mean
        return _RidgeSolution(weight, bias, objective, gap_bound)


def _solve_shifted(matrix: Array, right_side: Array, alphas: Array) -> Array:
    """Return (matrix + alpha I)^-1 right_side for every alpha, (n, A, T).

    matrix: (n, n) positive semidefinite. right_side: (n, T). For alpha = 0 and a singular matrix,
    the solution of least norm.
    """
    if len(alphas) < MIN_STRENGTHS_FOR_EIGENVALUES and alphas.min() > 0:
        solutions = []
        for alpha in alphas:
            shifted = matrix.copy()
            shifted.flat[:: len(matrix) + 1] += alpha
            try:
                factor = scipy.linalg.cho_factor(
                    shifted, lower=True, overwrite_a=True, check_finite=False
                )
            # alpha is smaller than the rounding errors of the diagonal.
            except np.linalg.LinAlgError:
                break
            solutions.append(scipy.linalg.cho_solve(factor, right_side, check_finite=False))
        if len(solutions) == len(alphas):
            return np.stack(solutions, axis=1)
    values, vectors = scipy.linalg.eigh(matrix, driver="evd", check_finite=False)
    floor = values.max(initial=0.0) * len(matrix) * np.finfo(np.float64).eps
    shifted = np.where(values > floor, values, 0.0)[:, None] + alphas
    inverse = np.where(shifted > floor, 1.0 / np.where(shifted > 0, shifted, 1.0), 0.0)
    rotated = (vectors.T @ right_side)[:, None] * inverse[:, :, None]
    return np.asarray((vectors @ rotated.reshape(len(matrix), -1)).reshape(rotated.shape))


def _strong_convexity(matrix: Array, alphas: Array) -> Array:
    """Return divisors d (A,) with objective - optimum <= |residual|^2 / d."""
    # alpha, but at least the rounding error of the matrix, for alpha = 0.
    trace = float(np.trace(matrix)) or 1.0
    return np.asarray(np.maximum(alphas, trace * np.finfo(np.float64).eps))


def _join_columns(solutions: list[_RidgeSolution]) -> _RidgeSolution:
    """Return the solutions of several target columns as one."""
    return _RidgeSolution(
        np.concatenate([solution.weight for solution in solutions], axis=1),
        np.concatenate([solution.bias for solution in solutions], axis=1),
        np.sum([solution.objective for solution in solutions], axis=0),
        np.sum([solution.gap_bound for solution in solutions], axis=0),
    )


def _scores(X: Features, row_index: Index, weight: Array, bias: Array, common: Moments) -> Array:
    """Return scores of the given rows by all heads, (A, n, T) float32, as `predict_head` does."""
    # In the chunks of `predict_head`. If means are far larger than the features' scales, also head
    # by head: a product for all heads sums in another order, which then shows in the fourth digit.
    # Head by head takes 1.14 times the CPU time of a bank (60 strengths, 5,000 x 512).
    n_heads, n_targets, _ = weight.shape
    scores = np.empty((n_heads, len(row_index), n_targets), np.float32)
    offsets_are_small = bool((np.abs(common.mean) <= MAX_OFFSET * common.scale).all())
    for positions in chunks(np.arange(len(row_index)), ROWS_AT_ONCE):
        rows = X[row_index[positions]].astype(np.float32, copy=False)
        if offsets_are_small:
            product = (weight.reshape(n_heads * n_targets, -1) @ rows.T).reshape(
                n_heads, n_targets, -1
            )
            scores[:, positions] = product.transpose(0, 2, 1) + bias[:, None]
            continue
        for head, head_weight in enumerate(weight):
            scores[head, positions] = rows @ head_weight.T + bias[head]
    return scores


def _code_targets(target: Array, n_outputs: int, task_kind: TaskKind) -> Array:
    """Return the targets (N, T): float64 values, or classes and labels as int8 -1/+1."""
    if task_kind == "regression":
        return np.asarray(target.reshape(len(target), -1), np.float64)
    one_hot = target if task_kind == "multi" else target[:, None] == np.arange(n_outputs)
    return 2 * np.asarray(one_hot, np.int8) - 1


def _balanced_weights(
    data: TrainingData, columns: list[int], is_training: Array, sample_weight: Array | None
) -> Array:
    """Return weights (N,) that balance the classes of the training rows."""
    # Classes are counted in rows, not in sample weights, as in RidgeClassifier.
    target = data.target
    classes = target if data.task_kind == "single" else target[:, columns[0]].astype(np.int64)
    counts = np.bincount(classes[is_training])
    present = np.flatnonzero(counts)
    class_factors = np.zeros(int(classes.max(initial=0)) + 1)
    class_factors[present] = is_training.sum() / (len(present) * counts[present])
    return np.asarray(class_factors[classes] * (1.0 if sample_weight is None else sample_weight))


def _check(data: TrainingData, specs: Sequence[RidgeSpec]) -> None:
    check_specs(specs, "RidgeSpec(alpha=1.0)")
    check_rows(data)
    for spec in specs:
        if not (np.isfinite(spec.alpha) and spec.alpha >= 0):
            raise ValueError(
                f"alpha must be a number and not negative, found {spec.alpha}: it multiplies the "
                "penalty"
            )
