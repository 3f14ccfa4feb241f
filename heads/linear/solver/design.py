"""The design matrix of a logistic bank: rows centred, scaled, rotated and divided into row blocks.

N rows, D features, R rotated coordinates, C classes, L labels, A heads.

Coordinates. Let s be the scale of every feature over all rows and Q (D, R) an orthonormal basis of
eigenvectors of the Gram matrix of the scaled rows. The raw weights of a head are W = (Q u) / s, its
decision u . Q'((x - m)/s) + b. The standardization of a fold, and the values imputed in it, change
neither the rows nor the decision, only the penalty: it is u' P u, P = Q' M'M Q with the matrix M of
the fold (`FoldCoordinates`); without missing numbers M = diag(s_f/s), s_f its standard deviations
(the unpenalized intercept absorbs every mean). So all folds share one copy of the rows and differ
in P, which is near the identity. Many-class heads do not gain by sharing: where it is faster
(`should_copy_per_fold`), each fold has a copy of its rows in its own coordinates, rotated by the
same Q, and P is the identity.

Rows that do not fit into memory are read from their shards on every pass, and only centred. The
weights are scaled and rotated instead, and the gradients back, which costs as much as a few rows.

With fewer rows than features the coordinates are those of the row space: `dual_form.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from headrace.heads.arrays import Array, Index
from headrace.heads.data.fold_coordinates import FoldCoordinates, fold_coordinates
from headrace.heads.data.standardize import Features, Moments, chunks, scaled
from headrace.heads.data.streamed import StreamedRows
from headrace.heads.data.task import REFIT
from headrace.heads.linear.solver.compiled_blocks import (
    CompiledKernels,
    aligned_rows,
    load_compiled_kernels,
)
from headrace.heads.linear.solver.device_products import MatrixProduct, matrix_product
from headrace.heads.linear.solver.rotation import PerFoldRotation, Rotation, RowSpace

# (folds that train on some rows, the positions (n,) of these rows among the N).
FoldRows = tuple[tuple[int, ...], Index]
# Largest ratio of a fold's scales to the common ones, or the reverse. Beyond it, float32 rows in
# common coordinates lose digits of the fold; in the dual form its square is the condition number of
# a factor.
MAX_SCALE_RATIO = 30.0
ROWS_PER_BLOCK = 8192  # of rows in memory
ROWS_PER_STREAMED_BLOCK = 1024  # of streamed rows, so that a block stays in the caches
STREAMED_BASIS_ROWS = 1 << 15  # of streamed rows, from which the rotation is computed
# Free weight vectors (65 classes) from which a head gains nothing by sharing a pass with others.
MANY_FREE_VECTORS = 64
# Products with P per head: about five evaluations, and two for its gap bound.
PENALTY_PRODUCTS_PER_HEAD = 7
MAX_COPIED_BYTES = 1 << 28  # of per-fold copies, 256 MB
# Scale ratio beyond which folds have no copies: the preconditioner sees rows in one fold's scales
# only, and with one outlier 400 times as far away as other rows heads took twice the iterations.
MAX_COPIED_SCALE_RATIO = 3.0
MIN_CLASSES_FOR_STORED_PENALTY = 48  # see `multiply_by_penalty`


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Rows on which the same folds train, sorted by class."""

    folds: tuple[int, ...]
    row_index: Index  # (n,) row numbers of the task
    # (n, R + 1), the last column 1 for the intercept; empty for streamed rows.
    values: Array
    # (C + 1,), single label: class k has the rows class_offsets[k]:class_offsets[k + 1].
    class_offsets: Index
    labels: Array  # (L, n) 0/1: binary and multi-label
    sample_weight: Array | None  # (n,); None: all one

    @functools.cached_property
    def classes(self) -> npt.NDArray[np.int32]:
        """The class of each row, (n,), of a single-label task."""
        n_classes = len(self.class_offsets) - 1
        return np.repeat(np.arange(n_classes, dtype=np.int32), np.diff(self.class_offsets))


@dataclass(frozen=True)
class DesignMatrix:
    """Rotated rows, and their relation to raw features."""

    row_blocks: list[RowBlock]
    dtype: np.dtype[Any]
    rotation: Rotation | PerFoldRotation | RowSpace
    mean: Array  # (D,) float64
    inverse_scale: Array  # (D,) float64, 0 for constant features
    # {fold: M} for folds of which it is not the identity; {} with per-fold copies.
    coordinates: dict[int, FoldCoordinates]
    # Unstandardized features are divided by this one number; 1 for standardized ones.
    feature_divisor: float
    streamed_rows: StreamedRows | None = None  # from which blocks read their rows on every pass
    # {fold: P (R, R)}, computed when first needed
    penalty_matrices: dict[int, Array] = field(default_factory=dict)
    # {number of rows of a block: buffer for their values}
    read_buffers: dict[int, Array] = field(default_factory=dict)

    @property
    def n_coordinates(self) -> int:
        """R + 1, the number of rotated coordinates and the intercept."""
        return self.rotation.rank + 1

    @property
    def has_per_fold_coordinates(self) -> bool:
        """Whether each fold has coordinates of its own (the dual form)."""
        return isinstance(self.rotation, RowSpace)

    def read(self, block: RowBlock) -> Array:
        """Return a block's values (n, W), the intercept's 1 last.

        W is R + 1. For a streamed block it is D + 1, the rows are only centred, and the next call
        overwrites the array.
        """
        if self.streamed_rows is None:
            return block.values
        n_rows, n_features = len(block.row_index), self.streamed_rows.shape[1]
        if n_rows not in self.read_buffers:
            self.read_buffers[n_rows] = aligned_rows(n_rows, n_features + 1, self.dtype)
            self.read_buffers[n_rows][:, -1] = 1
        values, stored = self.read_buffers[n_rows], self.streamed_rows.stored(block.row_index)
        kernels, mean = kernels_for(self.dtype), self.mean.astype(self.dtype)
        if kernels is not None and stored.dtype == np.float16:
            kernels.subtract_mean_from_float16(stored, mean, values[:, :-1])
        else:
            np.subtract(stored, mean, out=values[:, :-1])
        return values

    def to_block_coordinates(self, weights: Array) -> Array:
        """Return weights (k, R + 1) in the coordinates of the blocks' values, (k, W)."""
        if self.streamed_rows is None:
            return weights
        assert isinstance(self.rotation, Rotation)
        rotated = self.rotation.to_features(weights[:, :-1])
        rescaled = rotated * self.inverse_scale.astype(self.dtype)
        return np.concatenate([rescaled, weights[:, -1:]], axis=1)

    def from_block_coordinates(self, gradients: Array) -> Array:
        """Return gradients or rows (k, W) of the blocks in rotated coordinates, (k, R + 1)."""
        if self.streamed_rows is None:
            return gradients
        assert isinstance(self.rotation, Rotation)
        rescaled = gradients[:, :-1] * self.inverse_scale.astype(self.dtype)
        return np.concatenate([self.rotation.from_features(rescaled), gradients[:, -1:]], axis=1)

    def multiply_by_penalty(self, u: Array, folds: Array) -> Array:
        """Return u P (A, C, R) for heads u (A, C, R) of the given folds (A,)."""
        if not self.coordinates:
            return u
        assert isinstance(self.rotation, Rotation)
        matrix = self.rotation.matrix
        # For few classes P is applied as Q' M'M Q: twice the flops of a stored P, but one product
        # for the heads of all folds. With 1,280 features, five folds and ten classes that is twice
        # as fast; with 100 classes a stored P is faster (1.08 of the CPU time without, 2,000 x
        # 768).
        if u.shape[1] >= MIN_CLASSES_FOR_STORED_PENALTY:
            product = np.empty_like(u)
            for head, out, fold in zip(u, product, folds.tolist(), strict=True):
                penalty = self._penalty_matrix(fold)
                out[:] = head if penalty is None else head @ penalty
            return product
        in_features = (u.reshape(-1, u.shape[-1]) @ matrix.T).reshape(*u.shape[:2], -1)
        for fold, coordinates in self.coordinates.items():
            in_fold = folds == fold
            in_features[in_fold] = coordinates.penalty_gradient(in_features[in_fold])
        return np.asarray((in_features.reshape(-1, len(matrix)) @ matrix).reshape(u.shape))

    def _penalty_matrix(self, fold: int) -> Array | None:
        """Return P (R, R) of a fold, or None if it is the identity."""
        if fold in self.coordinates and fold not in self.penalty_matrices:
            assert isinstance(self.rotation, Rotation)
            root = self.coordinates[fold].weights(self.rotation.matrix.T)
            self.penalty_matrices[fold] = root @ root.T
        return self.penalty_matrices.get(fold)

    def penalty_root(self, u: Array, folds: Array) -> Array:
        """Return M Q u (A, C, D) float64 of heads u (A, C, R), with P = (M Q)' M Q.

        If P is the identity for all folds, u (A, C, R) itself.
        """
        return self._through_features(u, folds, FoldCoordinates.weights)

    def inverse_penalty_root(self, gradients: Array, folds: Array) -> Array:
        """Return M'^-1 Q g (A, C, D) float64 of gradients g (A, C, R): its dot products are those
        of g with P^-1.

        If P is the identity for all folds, g (A, C, R) itself.
        """
        return self._through_features(gradients, folds, FoldCoordinates.rows)

    def _through_features(
        self, u: Array, folds: Array, change: Callable[[FoldCoordinates, Array], Array]
    ) -> Array:
        if not self.coordinates:
            return u.astype(np.float64)
        assert isinstance(self.rotation, Rotation)
        flat = u.reshape(-1, u.shape[-1]).astype(self.dtype, copy=False)
        in_features = self.rotation.to_features(flat).astype(np.float64)
        in_features = in_features.reshape(*u.shape[:2], -1)
        for fold, coordinates in self.coordinates.items():
            in_fold = folds == fold
            in_features[in_fold] = change(coordinates, in_features[in_fold])
        return in_features

    def to_raw_weights(self, u: Array, folds: Array) -> tuple[Array, Array]:
        """Return weights (k, D) and biases (k,) for raw features, float64, from u (k, R + 1).

        folds: (k,) the fold of each row of u.
        """
        weight = self.rotation.to_features(u[:, :-1], folds).astype(np.float64, copy=False)
        bias = u[:, -1] - self.rotation.mean_decisions(weight, folds)
        weight *= self.inverse_scale
        return weight, bias - weight @ self.mean

    def from_raw_weights(self, weight: Array, bias: Array, folds: Array) -> Array:
        """Return u (k, R + 1) from raw weights and biases, exact in the design's row space."""
        rescaled = weight / np.where(self.inverse_scale > 0, self.inverse_scale, 1.0)
        intercept = bias + weight @ self.mean + self.rotation.mean_decisions(rescaled, folds)
        u = self.rotation.from_features(rescaled, folds)
        return np.concatenate([u, intercept[:, None]], axis=1).astype(self.dtype)


def should_copy_per_fold(
    scaling: dict[int, Moments], folds: Sequence[int], n_free: int, n_heads: int
) -> bool:
    """Return whether per-fold standardized float32 copies of the rows are faster.

    n_free: free weight vectors of a head: C - 1, or 1 for a sigmoid. n_heads: heads that use the
    copies.
    """
    # With copies P is the identity. Every evaluation is spared a product with D x D, a sixth of the
    # cost of 4,000 rows of 1,280 features at 100 classes, and every gap bound two of them. And no
    # preconditioner has to take P for the identity: at a gap of 1e-7 heads of 100 classes take
    # 1,479 iterations instead of 2,188. Without copies, 2,000 x 768 rows of 100 classes take 1.15
    # times the CPU time at a gap of 1e-5, 1.34 at 1e-7. On the other hand the rows of every fold
    # must be rotated, and heads of different folds share no pass, which matters for few classes.
    if len(folds) < 2 or n_free < MANY_FREE_VECTORS or kernels_for(np.float32) is None:
        return False
    common, ratio = scaling[REFIT], MAX_COPIED_SCALE_RATIO
    n_copied = sum(scaling[fold].count for fold in folds)
    return (
        n_copied <= PENALTY_PRODUCTS_PER_HEAD * n_heads * n_free
        and n_copied * len(common.mean) * 4 <= MAX_COPIED_BYTES
        and all(
            scales_are_similar(scaling[fold], common, standardize=True, max_ratio=ratio)
            for fold in folds
        )
    )


def make_design(
    X: Features,
    groups: Sequence[FoldRows],
    scaling: dict[int, Moments],
    *,
    standardize: bool,
    dtype: Any,
    copy_per_fold: bool = False,
    device: str = "cpu",
) -> DesignMatrix:
    """Return the design matrix of groups of rows of X (N, D), without labels.

    groups: rows by the folds that train on them; for a single fold its training rows.
    scaling: {fold: moments of its training rows}.
    copy_per_fold: give each fold a copy of its rows in its own coordinates, so that P is the
    identity.
    device: on which the Gram matrix and the rotated rows are computed; for many rows that takes
    longer than solving all heads.
    """
    multiply = matrix_product(device)
    common, inverse_scale, coordinates, feature_divisor = common_coordinates(
        scaling, standardize=standardize, dtype=dtype
    )
    standardized = [
        standardize_rows(X, rows, common.mean, inverse_scale, dtype) for _, rows in groups
    ]
    n_features = X.shape[1]
    gram = np.zeros((n_features, n_features), dtype)
    for rows in standardized:
        gram += multiply(rows.T, rows)
    rotation = _rotation(gram)
    row_blocks = []
    for group_index, (folds, row_index) in enumerate(groups):
        rows = standardized[group_index]
        # Freed here, so that standardized and rotated rows are not in memory together.
        standardized[group_index] = np.empty((0, 0), dtype)
        for block_folds in [(fold,) for fold in folds] if copy_per_fold else [folds]:
            block_coordinates = coordinates.get(block_folds[0]) if copy_per_fold else None
            row_blocks += make_row_blocks(
                block_folds,
                row_index,
                functools.partial(_rotate_rows, multiply, rotation, rows, block_coordinates),
                n_features,
                dtype,
            )
    return DesignMatrix(
        row_blocks,
        np.dtype(dtype),
        PerFoldRotation(rotation, coordinates) if copy_per_fold else rotation,
        common.mean,
        inverse_scale,
        {} if copy_per_fold else coordinates,
        feature_divisor,
    )


def _rotation(gram: Array) -> Rotation:
    """Return the rotation into the eigenvectors of a Gram matrix (D, D), which is overwritten."""
    _, vectors = scipy.linalg.eigh(gram, driver="evd", overwrite_a=True, check_finite=False)
    # Reversed: the coordinate of the largest eigenvalue comes first.
    return Rotation(np.ascontiguousarray(vectors[:, ::-1]))


def kernels_for(dtype: Any) -> CompiledKernels | None:
    """Return the compiled kernels, if there are any and they take numbers of this dtype."""
    return load_compiled_kernels() if np.dtype(dtype) == np.float32 else None


def _rotate_rows(
    multiply: MatrixProduct,
    rotation: Rotation,
    standardized: Array,
    coordinates: FoldCoordinates | None,
    rows: slice,
) -> Array:
    values = standardized[rows]
    return multiply(values if coordinates is None else coordinates.rows(values), rotation.matrix)


def make_row_blocks(
    folds: tuple[int, ...],
    row_index: Index,
    rotate: Callable[[slice], Array],
    rank: int,
    dtype: Any,
) -> list[RowBlock]:
    """Return the blocks of a group of rows, without labels.

    rotate: returns the rotated values (n, R) of a slice of the rows.
    """
    row_blocks = []
    for start in range(0, len(row_index), ROWS_PER_BLOCK):
        rows = row_index[start : start + ROWS_PER_BLOCK]
        values = aligned_rows(len(rows), rank + 1, dtype)
        values[:, -1] = 1
        values[:, :-1] = rotate(slice(start, start + len(rows)))
        row_blocks.append(_unlabelled(folds, rows, values))
    return row_blocks


def _unlabelled(folds: tuple[int, ...], row_index: Index, values: Array) -> RowBlock:
    no_labels = np.zeros((0, len(row_index)))
    return RowBlock(folds, row_index, values, np.zeros(0, np.intp), no_labels, None)


def make_streamed_design(
    X: StreamedRows,
    block_rows: Sequence[FoldRows],
    scaling: dict[int, Moments],
    *,
    standardize: bool,
    dtype: Any,
) -> DesignMatrix:
    """Return the design matrix of rows X (N, D) that are read again on every pass.

    block_rows: the row blocks, in the order of reading. Other arguments as in `make_design`.
    """
    common, inverse_scale, coordinates, feature_divisor = common_coordinates(
        scaling, standardize=standardize, dtype=dtype
    )
    # Rounded to float32, as `read` subtracts it, so that intercepts correct for just that mean.
    mean = common.mean.astype(np.float32).astype(np.float64)
    empty = np.empty((0, 0), dtype)
    row_blocks = [_unlabelled(folds, rows, empty) for folds, rows in block_rows]
    n_features = X.shape[1]
    unrotated = DesignMatrix(
        row_blocks,
        np.dtype(dtype),
        Rotation(np.eye(n_features, dtype=dtype)),
        mean,
        inverse_scale,
        coordinates,
        feature_divisor,
        X,
    )
    # Streamed rows are not rotated, so the basis only serves the preconditioner, for which a
    # sample of the rows is enough.
    n_rows = sum(len(rows) for _, rows in block_rows)
    step = max(n_rows // max(STREAMED_BASIS_ROWS, 16 * n_features), 1)
    gram = np.zeros((n_features, n_features), dtype)
    for block in row_blocks[::step]:
        rows = unrotated.read(block)[:, :-1] * inverse_scale.astype(dtype)
        gram += rows.T @ rows
    return dataclasses.replace(unrotated, rotation=_rotation(gram))


def common_coordinates(
    scaling: dict[int, Moments], *, standardize: bool, dtype: Any
) -> tuple[Moments, Array, dict[int, FoldCoordinates], float]:
    """Return the common moments, and three of DesignMatrix: `inverse_scale`, `coordinates`,
    `feature_divisor`.

    scaling: {fold: moments of its training rows}.
    """
    shared = len(scaling) > 1
    common = scaling[REFIT] if shared else next(iter(scaling.values()))
    # Unstandardized features are divided by one number, so that squares stay in float32's range.
    feature_divisor = 1.0 if standardize else largest_scale(common)
    scale = common.scale if standardize else np.full(len(common.mean), feature_divisor)
    coordinates = {}
    for fold, moments in scaling.items():
        if moments.fills or (standardize and moments is not common):
            fold_scale = moments.scale if standardize else scale
            coordinates[fold] = fold_coordinates(moments, common, fold_scale, scale, dtype=dtype)
    return common, np.where(common.constant, 0.0, 1.0 / scale), coordinates, feature_divisor


def largest_scale(moments: Moments) -> float:
    """Return the largest scale of the features that vary; 1 if none varies."""
    return float(moments.scale[~moments.constant].max(initial=0.0)) or 1.0


def scales_are_similar(
    fold_moments: Moments, common: Moments, *, standardize: bool, max_ratio: float = MAX_SCALE_RATIO
) -> bool:
    """Return whether a fold's training rows keep their digits in the coordinates of all rows.

    A single outlier may prevent it: the fold that holds it out has much smaller scales.
    """
    ratio = np.array([largest_scale(fold_moments) / largest_scale(common)])
    if standardize:
        ratio = fold_coordinates(fold_moments, common, fold_moments.scale, common.scale).ratio
    return bool(max_ratio * ratio.min() >= 1 and ratio.max() <= max_ratio)


def standardize_rows(
    X: Features, row_index: Index, mean: Array, inverse_scale: Array, dtype: Any
) -> Array:
    """Return rows of X centred and scaled, computed in float64 and stored as `dtype`."""
    standardized = np.empty((len(row_index), X.shape[1]), dtype)
    start = 0
    for rows in chunks(row_index):
        standardized[start : start + len(rows)] = scaled(X[rows], mean, inverse_scale)
        start += len(rows)
    return standardized
