"""The dual form of a logistic bank, for fewer rows than features.

N rows of all folds, n of one, D features, R <= n coordinates.

By the representer theorem the weights of a head lie exactly in the row space of its training rows.
The coordinates of a fold are a pivoted Cholesky factor of the products of its own rows, in float64,
rotated so that the rows' leading directions come first: the preconditioner uses these, and the
diagonal of the rest. One eigendecomposition of all rows with a factor for each fold took twice as
long, and all eigenvectors save no iterations (464 with all, 444 to 503 with 32 to 128 leading
directions; on noise 277, and 313 to 338).

Each fold has coordinates, centre and scales of its own training rows, and heads of all folds can be
in the active set together. If the scales of folds differ too much for float32
(`design.scales_are_similar`), or their copies of the rows do not fit (`copies_fit`), each fold is
solved by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from headrace.heads.arrays import Array, Index
from headrace.heads.data.fold_coordinates import FoldCoordinates
from headrace.heads.data.standardize import Features, Moments
from headrace.heads.linear.solver.design import (
    DesignMatrix,
    FoldRows,
    common_coordinates,
    make_row_blocks,
    standardize_rows,
)
from headrace.heads.linear.solver.rotation import FoldRowSpace, RowSpace, multiply_by_q

MAX_COPIED_BYTES = 1 << 29  # of the folds' copies of the rows, float32
# Number of leading directions, and of subspace iterations to find them. Without them 1,000 x 2,048
# rows take 938 iterations instead of 491, 1.34 times the CPU time.
LEADING_DIRECTIONS, SUBSPACE_ITERATIONS = 64, 2
COLUMNS_PER_CHUNK = 4096  # that are copied in float64 together


def copies_fit(scaling: dict[int, Moments], folds: Sequence[int], n_rows: int) -> bool:
    """Return whether the copies of these folds, in at most `n_rows` coordinates, fit in memory."""
    return sum(scaling[fold].count for fold in folds) * n_rows * 4 <= MAX_COPIED_BYTES


@dataclass(frozen=True)
class _FoldFactor:
    """Training rows of a fold and the pivoted Cholesky factor of their products."""

    folds: tuple[int, ...]
    rows: Index  # (n,) of the task
    order: Index  # (n,) the rows in the order of their pivots
    lower: Array  # (n, R) float64, in that order


@dataclass(frozen=True)
class DualForm:
    """Rows in the coordinates of each fold, from which designs of either dtype are made.

    The factorization is most of the time of a design (1,968 x 2,816 rows, 6 folds: 0.55 of 0.66 s).
    """

    row_space: RowSpace
    fold_factors: list[_FoldFactor]
    common: Moments
    inverse_scale: Array  # (D,)
    feature_divisor: float

    def design(self, dtype: Any) -> DesignMatrix:
        """Return the design matrix, without labels."""
        row_blocks = []
        for factor in self.fold_factors:
            space = self.row_space.fold_spaces[factor.folds[0]]
            coordinates = np.zeros((len(factor.rows), self.row_space.rank), dtype)
            coordinates[factor.order, : factor.lower.shape[1]] = multiply_by_q(
                space.reflectors.astype(dtype),
                space.reflector_scales.astype(dtype),
                factor.lower.astype(dtype),
                side="R",
            )
            row_blocks += make_row_blocks(
                factor.folds, factor.rows, coordinates.__getitem__, self.row_space.rank, dtype
            )
        return DesignMatrix(
            row_blocks,
            np.dtype(dtype),
            self.row_space,
            self.common.mean,
            self.inverse_scale,
            {},
            self.feature_divisor,
        )


def make_dual_form(
    X: Features, groups: Sequence[FoldRows], scaling: dict[int, Moments], *, standardize: bool
) -> DualForm:
    """Return the dual form of rows of X (N, D) for the folds in `scaling`.

    groups: for each fold its own training rows. scaling: {fold: moments of its training rows}.
    """
    common, inverse_scale, coordinates, feature_divisor = common_coordinates(
        scaling, standardize=standardize, dtype=np.float64
    )
    row_index = np.unique(np.concatenate([rows for _, rows in groups]))
    # float64, so that rows that differ only in their last digits stay different.
    Z = standardize_rows(X, row_index, common.mean, inverse_scale, np.float64)
    fold_spaces: dict[int, FoldRowSpace] = {}
    fold_factors = []
    for folds, rows in groups:
        order, lower, fold_spaces[folds[0]] = _fold_row_space(
            Z, np.searchsorted(row_index, rows), coordinates.get(folds[0])
        )
        fold_factors.append(_FoldFactor(folds, rows, order, lower))
    return DualForm(RowSpace(Z, fold_spaces), fold_factors, common, inverse_scale, feature_divisor)


def _fold_row_space(
    Z: Array, rows: Index, coordinates: FoldCoordinates | None
) -> tuple[Index, Array, FoldRowSpace]:
    """Return the pivoted Cholesky factor of the products of Z[rows] and the row space.

    The factor is the order (n,) of the pivots and the rows (n, R) float64 in that order.
    """
    mean = Z[rows].mean(axis=0)
    gram = np.zeros((len(rows), len(rows)), order="F")
    for start in range(0, Z.shape[1], COLUMNS_PER_CHUNK):
        stop = start + COLUMNS_PER_CHUNK
        # One column more: the last one may be a number that some rows lack, which the next column
        # imputes.
        centred = Z[rows, start : stop + 1] - mean[start : stop + 1]
        if coordinates is not None:
            centred = coordinates.columns(start, stop + 1).rows(centred)
        centred = centred[:, :COLUMNS_PER_CHUNK]
        gram = scipy.linalg.blas.dsyrk(
            1.0, centred.T, beta=1.0, c=gram, trans=1, lower=1, overwrite_c=1
        )
    # The factorization ends at pivots that are only rounding errors.
    floor = len(rows) * np.finfo(np.float64).eps * gram.diagonal().max(initial=0.0)
    factor, order, rank, _ = scipy.linalg.lapack.dpstrf(gram, tol=floor, lower=1, overwrite_a=1)
    order, lower = order - 1, np.tril(factor[:, :rank])
    # In float32, because results are exact in any orthogonal basis; a good one saves iterations.
    reflectors, reflector_scales = _leading_directions(lower.astype(np.float32))
    fold_space = FoldRowSpace(
        rows[order[:rank]], lower[:rank], reflectors, reflector_scales, mean, coordinates
    )
    return order, lower, fold_space


def _leading_directions(lower: Array) -> tuple[Array, Array]:
    """Return an orthogonal matrix (R, R) as LAPACK's geqrf stores it, float64.

    Its first columns are the leading directions of the rows `lower` (n, R), the largest first, by
    subspace iteration (Halko, Martinsson & Tropp, SIAM Review 2011, algorithm 4.4).
    """
    # It starts from the rows of the first pivots, which are long and far from parallel.
    subspace = lower.T @ lower[:, : min(LEADING_DIRECTIONS, lower.shape[1])]
    for _ in range(SUBSPACE_ITERATIONS):
        subspace = lower.T @ (lower @ np.linalg.qr(subspace)[0])
    subspace = np.linalg.qr(subspace)[0]
    projected = lower @ subspace
    subspace = subspace @ np.linalg.eigh(projected.T @ projected)[1][:, ::-1]
    (reflectors, reflector_scales), _ = scipy.linalg.qr(
        subspace.astype(np.float64), mode="raw", check_finite=False
    )
    return reflectors, reflector_scales
