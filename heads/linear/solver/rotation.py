"""Linear maps between standardized features and the coordinates that a logistic bank solves in.

D features, R coordinates, n rows, k heads. With v the weights of a head for standardized
features and u those for its coordinates, the decision on a row z is z . v = y . u, y the rotated
row, and the penalty of v is that of u.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from headrace.heads.arrays import Array, Index
from headrace.heads.data.fold_coordinates import FoldCoordinates


@dataclass(frozen=True)
class Rotation:
    """An orthonormal basis Q (D, R), shared by all folds: v = Q u."""

    matrix: Array

    @property
    def rank(self) -> int:
        return int(self.matrix.shape[1])

    def to_features(self, u: Array, folds: Array | None = None) -> Array:
        """Return v = u Q' (k, D) of u (k, R)."""
        return np.asarray(u @ self.matrix.T)

    def from_features(self, v: Array, folds: Array | None = None) -> Array:
        """Return u = v Q (k, R) of v (k, D)."""
        return np.asarray(v @ self.matrix)

    def mean_decisions(self, v: Array, folds: Array) -> Array:
        """Return zeros (k,): rows are centred alike for all folds."""
        return np.zeros(len(v))


@dataclass(frozen=True)
class PerFoldRotation:
    """A rotation after the standardization of each fold.

    With the fold's matrix M, v = M^-1 Q u: the penalty |M v| is |u|. The rows of a fold are
    z M^-1 Q, a copy for each fold.
    """

    rotation: Rotation
    coordinates: dict[int, FoldCoordinates]

    @property
    def rank(self) -> int:
        return self.rotation.rank

    def to_features(self, u: Array, folds: Array) -> Array:
        """Return v (k, D) of u (k, R), heads of the given folds (k,)."""
        v = self.rotation.to_features(u)
        for fold, coordinates in self.coordinates.items():
            in_fold = folds == fold
            v[in_fold] = coordinates.common_weights(v[in_fold])
        return v

    def from_features(self, v: Array, folds: Array) -> Array:
        """Return u (k, R) of v (k, D), heads of the given folds (k,)."""
        rescaled = v.copy()
        for fold, coordinates in self.coordinates.items():
            in_fold = folds == fold
            rescaled[in_fold] = coordinates.weights(v[in_fold])
        return self.rotation.from_features(rescaled)

    def mean_decisions(self, v: Array, folds: Array) -> Array:
        """Return zeros (k,): rows are centred alike for all folds."""
        return np.zeros(len(v))


@dataclass(frozen=True)
class FoldRowSpace:
    """Coordinates in the row space of a fold's training rows S = (Z - c) M^-1.

    c (D,) is the rows' mean and M the fold's matrix.

    S S' = L L' with L (n, R) lower triangular in the order of its pivots; the rows' coordinates are
    Y = L V, V orthogonal. Of all v with the decisions (Z - c) v = Y u, the least penalized, with
    |M v| = |u|, is M^-1 S' a with a on the pivot rows: L' a = V u there.
    """

    pivot_rows: Index  # (R,) rows of the row space
    cholesky_factor: Array  # (R, R) float64, L of the pivot rows
    reflectors: Array  # (R, K) float64 and
    reflector_scales: Array  # (K,): V as LAPACK's geqrf stores it
    # c, float64. Rows that are not centred on their own mean would have a direction along which all
    # decisions move alike and the intercept moves them back: along it the objective hardly curves,
    # and no diagonal shows that.
    mean: Array
    coordinates: FoldCoordinates | None  # M; None: the identity

    def row_combination(self, u: Array) -> Array:
        """Return a (k, R) float64 of u (k, R)."""
        v = u.T.astype(np.float64)
        rotated = multiply_by_q(self.reflectors, self.reflector_scales, v, side="L")
        combination = scipy.linalg.solve_triangular(
            self.cholesky_factor, rotated, lower=True, trans=1, check_finite=False
        )
        return np.asarray(combination.T)

    def from_decisions(self, decisions: Array) -> Array:
        """Return u (k, R) float64 of decisions (k, R) on the pivot rows."""
        solved = scipy.linalg.solve_triangular(
            self.cholesky_factor, decisions.T, lower=True, check_finite=False
        )
        u = multiply_by_q(self.reflectors, self.reflector_scales, solved, side="L", transposed=True)
        return np.asarray(u.T)


@dataclass(frozen=True)
class RowSpace:
    """Coordinates in the row space of n < D rows Z (n, D), different ones for every fold."""

    # Z; float64, because weights divided by the lengths of thin directions cancel in products
    rows: Array
    fold_spaces: dict[int, FoldRowSpace]

    @property
    def rank(self) -> int:
        """R of the largest fold: the coordinates of the others end in zeros."""
        return int(max(len(space.pivot_rows) for space in self.fold_spaces.values()))

    def to_features(self, u: Array, folds: Array) -> Array:
        """Return v (k, D) float64 of u (k, R), heads of the given folds (k,)."""
        combination = np.zeros((len(u), len(self.rows)))
        for heads, space in self._heads_by_space(folds):
            combination[np.ix_(heads, space.pivot_rows)] = space.row_combination(
                u[heads, : len(space.pivot_rows)]
            )
        v = combination @ self.rows
        for heads, space in self._heads_by_space(folds):
            v[heads] -= np.outer(combination[heads].sum(axis=1), space.mean)
            if space.coordinates is not None:
                v[heads] = space.coordinates.common_weights(space.coordinates.rows(v[heads]))
        return np.asarray(v)

    def from_features(self, v: Array, folds: Array) -> Array:
        """Return u (k, R) float64 of v (k, D), as far as v lies in the row space."""
        decisions = v @ self.rows.T
        u = np.zeros((len(v), self.rank))
        for heads, space in self._heads_by_space(folds):
            mean_decisions = v[heads] @ space.mean[:, None]
            centred = decisions[np.ix_(heads, space.pivot_rows)] - mean_decisions
            u[heads, : len(space.pivot_rows)] = space.from_decisions(centred)
        return u

    def mean_decisions(self, v: Array, folds: Array) -> Array:
        """Return the decisions (k,) float64 of v (k, D) on the mean row of their folds."""
        decisions = np.zeros(len(v))
        for heads, space in self._heads_by_space(folds):
            decisions[heads] = v[heads] @ space.mean
        return decisions

    def _heads_by_space(self, folds: Array) -> Iterator[tuple[Index, FoldRowSpace]]:
        """Yield the positions of the heads of each fold, and its space."""
        for fold, space in self.fold_spaces.items():
            heads = np.flatnonzero(folds == fold)
            if heads.size:
                yield heads, space


def multiply_by_q(
    reflectors: Array,
    reflector_scales: Array,
    values: Array,
    *,
    side: str,
    transposed: bool = False,
) -> Array:
    """Return V values (side "L") or values V ("R"), with V' for V if transposed.

    V is orthogonal, as LAPACK's geqrf stores it.
    """
    if not values.size or not reflector_scales.size:
        return values
    (ormqr,) = scipy.linalg.get_lapack_funcs(("ormqr",), (reflectors, values))
    trans, workspace = "T" if transposed else "N", 64 * max(values.shape)
    product, _, info = ormqr(side, trans, reflectors, reflector_scales, values, lwork=workspace)
    assert info == 0
    return np.asarray(product)
