"""From features to the coordinates that a logistic bank solves in, and back.

D features, R coordinates, n rows, F folds. With v a head's weights of scaled features and u those of its coordinates, a row z's
decision is z . v = y . u, y the rotated row, and the penalty of v is that of u.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rotation:
    """Orthonormal Q (D, R) as a matrix: v = Q u."""

    matrix: Array

    @property
    def rank(self) -> int:
        return int(self.matrix.shape[1])

    def out(self, u: Array, folds: Array | None = None) -> Array:
        """u Q' (k, D) of u (k, R), whatever their folds."""
        return np.asarray(u @ self.matrix.T)

    def back(self, v: Array, folds: Array | None = None) -> Array:
        """v Q (k, R) of v (k, D), whatever their folds."""
        return np.asarray(v @ self.matrix)


@dataclass(frozen=True)
class Span:
    """Orthonormal Q = Z' T in the span of few rows Z (n, D), with T (n, R): never formed here, for to use it would cost more.

    Folds that penalise |r v|^2, r (D,) the ratio of their scales to the common ones, have coordinates of their own. Of all v with
    the decisions u = Q'v, the least penalised is r^-2 Q G^-1 u, with penalty u' G^-1 u, G = Q' r^-2 Q = L L': a penalty of plain
    squares in L^-1 u. Rows are then Z Q L, a head's v is r^-2 Q L'^-1 u.
    """

    rows: Array  # Z, in the design's type
    combined: Array  # T; float64 where directions are hardly there: divided by next to nothing, they cancel
    roots: dict[int, Array] = field(default_factory=dict)  # fold -> L (R, R), lower triangular; none: the identity
    ratio: dict[int, Array] = field(default_factory=dict)  # fold -> r (D,); none: one

    @property
    def rank(self) -> int:
        return int(self.combined.shape[1])

    def out(self, u: Array, folds: Array) -> Array:
        """v (k, D) float64 of u (k, R) of heads of the given folds (k,)."""
        exact = self.combined.dtype
        q = u.astype(exact)
        for fold, root in self.roots.items():
            own = folds == fold
            q[own] = scipy.linalg.solve_triangular(root, q[own].T, lower=True, trans=1, check_finite=False).T
        v = ((q @ self.combined.T) @ self.rows.astype(exact, copy=False)).astype(np.float64)
        for fold, ratio in self.ratio.items():
            v[folds == fold] /= ratio**2
        return np.asarray(v)

    def back(self, v: Array, folds: Array) -> Array:
        """u (k, R) float64 of v (k, D), as far as v lies in the span."""
        exact = self.combined.dtype
        u = ((v.astype(exact) @ self.rows.T) @ self.combined).astype(np.float64)
        for fold, root in self.roots.items():
            own = folds == fold
            u[own] = scipy.linalg.solve_triangular(root, u[own].T, lower=True, check_finite=False).T
        return np.asarray(u)
