"""Banks of ridge heads in closed form: every strength and fold from one set of products.

N rows, D features, C classes or target columns (T), F folds, n training rows of a fold.

A head minimises  sum_i w_i |y_i - W z_i - b|^2 + alpha |W|^2  on features z standardised by its
training rows, the intercept free; classes are coded -1/+1, as scikit-learn's RidgeClassifier does.
With the products of the centred rows G = sum w z z' and B = sum w z y' the solution is (G + alpha
I) W = B. Standardisation only scales G and B.

Many strengths share one eigendecomposition G = Q diag(e) Q', so that each costs 2 D^2 C flops; a
few are solved by a Cholesky factorisation each. With n < D the same is done in the n x n matrix K =
Z Z' (W = Z' a, (K + alpha I) a = y).
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from headrace.heads.data.checks import check_specs
from headrace.heads.data.inputs import check_rows
from headrace.heads.data.standardize import (
    Features,
    Moments,
    chunks,
    group_moments,
    scaled,
    training_moments,
)
from headrace.heads.data.task import REFIT, TaskKind
from headrace.heads.data.training_data import TrainingData
from headrace.heads.linear.bands import with_bands
from headrace.heads.linear.gram import Products, add_up, group_products
from headrace.heads.predict import ROWS_AT_ONCE, ridge_link
from headrace.heads.spec import FitResult, RidgeSpec

Array = npt.NDArray[Any]

# An eigendecomposition costs about as much as this many Cholesky factorisations (float64: 17 at D =
# 512, 20 at 1,280).
STRENGTHS_WORTH_EIGENVALUES = 16
# means of so many scales lose two digits of float32's seven, and the order of sums a third
OFFSET_SEEN = 100.0


def fit_ridge_bank(
    data: TrainingData, specs: Sequence[RidgeSpec], *, refit: bool = True
) -> list[FitResult]:
    """Fit every spec on the training rows of every fold, and on all rows when `refit`.

    data: X (N, D) float, no test rows, in memory or streamed. Multi-label targets (N, L) are L
    independent problems.

    Arrays are weight (C, D) and bias (C,), float32, raw coordinates; `validation` is probabilities
    by `ridge_link`, for regression the values. Heads come spec by spec, for each its folds in
    order, then REFIT. Raises NotFinite (a ValueError) for NaN or infinite features, ValueError for
    shapes that do not fit and for negative strengths.
    """
    _check(data, specs)
    X, target, n_classes, kind = data.X, data.target, data.n_outputs, data.task_kind
    fold, sample_weight = np.asarray(data.fold, np.int64), data.sample_weight
    sample_weight = None if sample_weight is None or (sample_weight == 1).all() else sample_weight
    groups = group_moments(X, fold)
    plain = training_moments(groups)
    scalings = {False: plain}
    if any(spec.banded for spec in specs):
        scalings[True] = with_bands(X, target, fold, plain, data.band_widths, data.n_views)
    folds = data.folds_to_fit(refit=refit)
    coded = _coded(target, n_classes, kind)
    fits: dict[tuple[int, int], FitResult] = {}
    for weighting in sorted({spec.class_weight for spec in specs}):
        balanced = weighting == "balanced" and kind != "regression"
        # Balanced labels are weighted label by label: each is a problem of its own.
        problems = (
            [[c] for c in range(n_classes)]
            if balanced and kind == "multi"
            else [list(range(n_classes))]
        )
        # Products of each group, where every fold weights its rows alike, in units of either
        # scaling.
        shared: dict[bool, dict[int, Products]] = {False: {}, True: {}}
        for f, standardize, banded in itertools.product(folds, (False, True), (False, True)):
            wanted = (weighting, standardize, banded)
            chosen = [
                i
                for i, spec in enumerate(specs)
                if (spec.class_weight, spec.standardize, spec.banded) == wanted
            ]
            if not chosen:
                continue
            scaling = scalings[banded]
            began = time.perf_counter()
            alphas = np.array([specs[i].alpha for i in chosen])
            solved = []
            for columns in problems:
                weight = (
                    _balanced(target, columns, kind, fold != f, sample_weight)
                    if balanced
                    else sample_weight
                )
                rows = _Rows(
                    X, coded[:, columns], weight, fold, scaling, {} if balanced else shared[banded]
                )
                solved.append(rows.solve(f, alphas, standardize))
            joined = _join(solved)
            held = np.flatnonzero(fold == f)
            weight, bias = _raw(joined, scaling[REFIT])
            scores = None if f == REFIT else _scores(X, held, weight, bias, scaling[REFIT])
            seconds = (time.perf_counter() - began) / len(chosen)
            for row, i in enumerate(chosen):
                own = None if scores is None else scores[row]
                fits[i, f] = _head(
                    specs[i],
                    f,
                    joined,
                    row,
                    {"weight": weight[row], "bias": bias[row]},
                    own,
                    kind,
                    seconds,
                )
    return [fits[i, f] for i in range(len(specs)) for f in folds]


@dataclass(frozen=True)
class _Solved:
    """Solutions for A strengths in coordinates (x - mean of all rows) / (scale of all rows),
    float64.
    """

    weight: Array  # (A, T, D)
    bias: Array  # (A, T)
    objective: Array  # (A,)
    bound: Array  # (A,), at least objective - optimum


@dataclass(frozen=True)
class _Rows:
    """Rows, coded targets and weights of one problem; the products of the groups are computed when
    first needed.
    """

    X: Features
    Y: Array  # (N, T)
    weight: Array | None
    fold: Array
    scaling: dict[int, Moments]
    groups: dict[int, Products]

    def solve(self, f: int, alphas: Array, standardize: bool) -> _Solved:
        """Solutions of fold f."""
        whole, own = self.scaling[REFIT], self.scaling[f]
        factor = np.where(whole.constant, 0.0, 1.0 / whole.scale)
        # From the shared coordinates to those that are penalised; a feature that is constant in the
        # fold's training rows has no say there, and gets no weight.
        ratio = np.where(own.constant, 0.0, whole.scale / own.scale if standardize else whole.scale)
        if own.count < self.X.shape[1]:
            return self._solve_dual(f, alphas, factor, ratio)
        if not self.groups:
            self.groups.update(
                group_products(self.X, self.Y, self.weight, self.fold, whole.mean, factor)
            )
        raw = add_up(part for group, part in self.groups.items() if group != f)
        centred = raw.centred()
        gram, cross = centred.gram * np.outer(ratio, ratio), centred.cross * ratio[:, None]
        W = _solve_shifted(gram, cross, alphas)  # (D, A, T)
        flat = W.reshape(len(W), -1)
        residual = (gram @ flat).reshape(W.shape) + alphas[:, None] * W - cross[:, None]
        objective = (
            centred.squares.sum()
            - np.einsum("dt,dat->a", cross, W)
            + np.einsum("dat,dat->a", residual, W)
        )
        bound = np.einsum("dat,dat->a", residual, residual) / _modulus(gram, alphas)
        weight = np.ascontiguousarray((W * ratio[:, None, None]).transpose(1, 2, 0))
        mass = raw.mass or 1.0
        return _Solved(weight, raw.targets / mass - weight @ (raw.total / mass), objective, bound)

    def _solve_dual(self, f: int, alphas: Array, factor: Array, ratio: Array) -> _Solved:
        """With fewer rows than features:

        W = Z' a, (Z Z' + alpha I) a = y, rows times the root of their weight.
        """
        rows = np.flatnonzero(self.fold != f)
        root = np.sqrt(np.ones(len(rows)) if self.weight is None else self.weight[rows])
        mass = float(root @ root) or 1.0
        Z = scaled(self.X[rows], self.scaling[REFIT].mean, factor * ratio)
        mean, target_mean = root**2 @ Z / mass, root**2 @ self.Y[rows] / mass
        Z = (Z - mean) * root[:, None]
        y = (self.Y[rows] - target_mean) * root[:, None]
        kernel = Z @ Z.T
        a = _solve_shifted(kernel, y, alphas)  # (n, A, T)
        Ka = (kernel @ a.reshape(len(a), -1)).reshape(a.shape)
        short = (
            y[:, None] - Ka - alphas[:, None] * a
        )  # of the dual equation; Z' short is the residual of the primal one
        W = (Z.T @ a.reshape(len(a), -1)).reshape(-1, *a.shape[1:])
        errors = y[:, None] - Ka
        objective = np.einsum("nat,nat->a", errors, errors) + alphas * np.einsum(
            "nat,nat->a", a, Ka
        )
        pulled = (kernel @ short.reshape(len(a), -1)).reshape(a.shape)
        # Objective - optimum is short' K (K + alpha I)^-1 short, and K (K + alpha I)^-1 is below
        # both K / alpha and I. Where rows are nearly interpolated the first alone is larger by the
        # condition of K + alpha I.
        bound = np.maximum(np.einsum("nat,nat->a", short, pulled), 0.0) / _modulus(kernel, alphas)
        bound = np.minimum(bound, np.einsum("nat,nat->a", short, short))
        weight = np.ascontiguousarray((W * ratio[:, None, None]).transpose(1, 2, 0))
        return _Solved(
            weight,
            target_mean - weight @ (mean / np.where(ratio > 0, ratio, 1.0)),
            objective,
            bound,
        )


def _solve_shifted(matrix: Array, right: Array, alphas: Array) -> Array:
    """(matrix + alpha I)^-1 right for every alpha, (n, A, T): matrix (n, n) positive semidefinite,
    right (n, T).

    For alpha = 0 and a singular matrix, the solution of least norm.
    """
    if len(alphas) < STRENGTHS_WORTH_EIGENVALUES and alphas.min() > 0:
        solutions = []
        for alpha in alphas:
            shifted = matrix.copy()
            shifted.flat[:: len(matrix) + 1] += alpha
            try:
                factor = scipy.linalg.cho_factor(
                    shifted, lower=True, overwrite_a=True, check_finite=False
                )
            except np.linalg.LinAlgError:  # alpha is lost in the rounding of the diagonal
                break
            solutions.append(scipy.linalg.cho_solve(factor, right, check_finite=False))
        if len(solutions) == len(alphas):
            return np.stack(solutions, axis=1)
    values, vectors = scipy.linalg.eigh(matrix, driver="evd", check_finite=False)
    floor = values.max(initial=0.0) * len(matrix) * np.finfo(np.float64).eps
    shifted = np.where(values > floor, values, 0.0)[:, None] + alphas
    inverse = np.where(shifted > floor, 1.0 / np.where(shifted > 0, shifted, 1.0), 0.0)
    inside = (vectors.T @ right)[:, None] * inverse[:, :, None]
    return np.asarray((vectors @ inside.reshape(len(matrix), -1)).reshape(inside.shape))


def _modulus(matrix: Array, alphas: Array) -> Array:
    """A divisor d with objective - optimum <= |residual|^2 / d: alpha, or for alpha = 0 what
    rounding leaves of it.
    """
    scale = float(np.trace(matrix)) or 1.0
    return np.asarray(np.maximum(alphas, scale * np.finfo(np.float64).eps))


def _join(parts: list[_Solved]) -> _Solved:
    """Problems of different target columns as one."""
    return _Solved(
        np.concatenate([one.weight for one in parts], axis=1),
        np.concatenate([one.bias for one in parts], axis=1),
        np.sum([one.objective for one in parts], axis=0),
        np.sum([one.bound for one in parts], axis=0),
    )


def _raw(solved: _Solved, whole: Moments) -> tuple[Array, Array]:
    """Weights (A, T, D) and biases (A, T) in raw coordinates, float32: what is stored."""
    weight = solved.weight * np.where(whole.constant, 0.0, 1.0 / whole.scale)
    return weight.astype(np.float32), (solved.bias - weight @ whole.mean).astype(np.float32)


def _scores(
    X: Features, rows: npt.NDArray[np.intp], weight: Array, bias: Array, whole: Moments
) -> Array:
    """(A, n, T) float32 scores of the given rows by the stored arrays.

    In the blocks of `predict_head`, and where means are far larger than their features' scales,
    head by head: one product of all heads, three times as fast, sums in another order, and there
    the order is seen in the fourth digit.
    """
    heads, targets, _ = weight.shape
    scores = np.empty((heads, len(rows), targets), np.float32)
    together = bool((np.abs(whole.mean) <= OFFSET_SEEN * whole.scale).all())
    for where in chunks(np.arange(len(rows)), ROWS_AT_ONCE):
        z = X[rows[where]].astype(np.float32, copy=False)
        if together:
            product = weight.reshape(heads * targets, -1) @ z.T
            scores[:, where] = (
                product.reshape(heads, targets, -1).transpose(0, 2, 1) + bias[:, None]
            )
            continue
        for row, own in enumerate(weight):
            scores[row, where] = z @ own.T + bias[row]
    return scores


def _head(
    spec: RidgeSpec,
    f: int,
    solved: _Solved,
    row: int,
    arrays: dict[str, Array],
    scores: Array | None,
    kind: TaskKind,
    seconds: float,
) -> FitResult:
    """One head of a bank."""
    objective, bound = float(solved.objective[row]), float(solved.bound[row])
    gap = (
        bound / (objective - bound) if objective > bound else (0.0 if bound == 0 else float("inf"))
    )
    validation = None
    if scores is not None:
        validation = np.asarray(
            scores if kind == "regression" else ridge_link(scores, kind), np.float32
        )
    return FitResult(spec, f, arrays, objective, gap, 1, seconds, validation)


def _coded(target: Array, n_classes: int, kind: TaskKind) -> Array:
    """(N, T) targets: float64, or classes and labels as -1/+1 in a byte each."""
    if kind == "regression":
        return np.asarray(target.reshape(len(target), -1), np.float64)
    hot = target if kind == "multi" else target[:, None] == np.arange(n_classes)
    return 2 * np.asarray(hot, np.int8) - 1


def _balanced(
    target: Array, columns: list[int], kind: TaskKind, train: Array, sample_weight: Array | None
) -> Array:
    """(N,) weights that balance the classes of the training rows; counts are of rows, as
    RidgeClassifier's are.
    """
    member = target if kind == "single" else target[:, columns[0]].astype(np.int64)
    counts = np.bincount(member[train])
    present = np.flatnonzero(counts)
    factor = np.zeros(int(member.max(initial=0)) + 1)
    factor[present] = train.sum() / (len(present) * counts[present])
    return np.asarray(factor[member] * (1.0 if sample_weight is None else sample_weight))


def _check(data: TrainingData, specs: Sequence[RidgeSpec]) -> None:
    check_specs(specs, "RidgeSpec(alpha=1.0)")
    check_rows(data)
    for spec in specs:
        if not (np.isfinite(spec.alpha) and spec.alpha >= 0):
            raise ValueError(
                f"alpha must be a number and not negative, found {spec.alpha}: it multiplies the "
                "penalty"
            )
