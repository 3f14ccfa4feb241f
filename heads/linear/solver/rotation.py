"""From features to the coordinates that a logistic bank solves in, and back.

D features, R coordinates, n rows, F folds. With v a head's weights of scaled features and u those
of its coordinates, a row z's decision is z . v = y . u, y the rotated row, and the penalty of v is
that of u.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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

    def shift(self, v: Array, folds: Array) -> Array:
        """(k,) zeros: rows are centred alike for all folds."""
        return np.zeros(len(v))


@dataclass(frozen=True)
class OwnScales:
    """A rotation behind each fold's own scales, r (D,) over the common ones: v = r^-1 Q u, so that
    what is penalised, |r v|, is |u|. A fold's rows z are z r^-1 Q, which are copies of its own.
    """

    rotation: Rotation
    ratio: dict[int, Array]  # fold -> r

    @property
    def rank(self) -> int:
        return self.rotation.rank

    def out(self, u: Array, folds: Array) -> Array:
        """v (k, D) of u (k, R) of heads of the given folds (k,)."""
        v = self.rotation.out(u)
        for fold, ratio in self.ratio.items():
            own = folds == fold
            v[own] = v[own] / ratio
        return v

    def back(self, v: Array, folds: Array) -> Array:
        """u (k, R) of v (k, D)."""
        stretched = v.copy()
        for fold, ratio in self.ratio.items():
            stretched[folds == fold] *= ratio
        return self.rotation.back(stretched)

    def shift(self, v: Array, folds: Array) -> Array:
        """(k,) zeros: rows are centred alike for all folds."""
        return np.zeros(len(v))


@dataclass(frozen=True)
class Basis:
    """Coordinates in the span of a fold's rows S = (Z - c) r^-1, c (D,) their mean and r (D,) the
    ratio of the fold's scales to the common ones. Not centred on their own mean, n rows would have
    a direction along which they all have the same decision, which the intercept undoes: an optimum
    that hardly curves, and that no diagonal sees.

    S S' = L L' with L (n, R), lower triangular in its pivots' order; the rows' coordinates are Y =
    L V, V orthogonal. Of all v with the decisions (Z - c) v = Y u, the least penalised, |r v| =
    |u|, is r^-1 S' a with a on the R pivots: L' a = V u there.
    """

    pivots: npt.NDArray[np.intp]  # (R,) rows of the span
    root: Array  # (R, R) float64, L of the pivots
    reflectors: Array  # (R, K) float64 and
    lengths: Array  # (K,): V as LAPACK's geqrf has it
    centre: Array  # c, float64
    ratio: Array | None  # r; None: one

    def combination(self, u: Array) -> Array:
        """a (k, R) float64 of u (k, R)."""
        turned = turn(self.reflectors, self.lengths, u.T.astype(np.float64), side="L")
        return np.asarray(
            scipy.linalg.solve_triangular(
                self.root, turned, lower=True, trans=1, check_finite=False
            ).T
        )

    def back(self, decisions: Array) -> Array:
        """u (k, R) float64 of decisions (k, R) on the pivots."""
        inside = scipy.linalg.solve_triangular(
            self.root, decisions.T, lower=True, check_finite=False
        )
        return np.asarray(turn(self.reflectors, self.lengths, inside, side="L", transposed=True).T)


@dataclass(frozen=True)
class Span:
    """Coordinates in the span of few rows Z (n, D), every fold's own."""

    rows: Array  # Z, in the design's type
    bases: dict[int, Basis]  # by fold
    # float64 where directions are hardly there: divided by next to nothing, they cancel
    exact: np.dtype[Any]

    @property
    def rank(self) -> int:
        """R of the largest basis: the others' coordinates are followed by some that are always
        zero.
        """
        return int(max(len(basis.pivots) for basis in self.bases.values()))

    def out(self, u: Array, folds: Array) -> Array:
        """v (k, D) float64 of u (k, R) of heads of the given folds (k,)."""
        combined = np.zeros((len(u), len(self.rows)))
        for own, basis in self._owners(folds):
            combined[np.ix_(own, basis.pivots)] = basis.combination(u[own, : len(basis.pivots)])
        narrow = combined.astype(self.exact, copy=False)
        v = (narrow @ self.rows.astype(self.exact, copy=False)).astype(np.float64)
        for own, basis in self._owners(folds):
            v[own] -= np.outer(combined[own].sum(axis=1), basis.centre)
            if basis.ratio is not None:
                v[own] /= basis.ratio**2
        return np.asarray(v)

    def back(self, v: Array, folds: Array) -> Array:
        """u (k, R) float64 of v (k, D), as far as v lies in the span."""
        decisions = (v.astype(self.exact) @ self.rows.T).astype(np.float64)
        u = np.zeros((len(v), self.rank))
        for own, basis in self._owners(folds):
            centred = decisions[np.ix_(own, basis.pivots)] - v[own] @ basis.centre[:, None]
            u[own, : len(basis.pivots)] = basis.back(centred)
        return u

    def shift(self, v: Array, folds: Array) -> Array:
        """(k,) float64 decisions of v (k, D) at their folds' means."""
        out = np.zeros(len(v))
        for own, basis in self._owners(folds):
            out[own] = v[own] @ basis.centre
        return out

    def _owners(self, folds: Array) -> Iterator[tuple[npt.NDArray[np.intp], Basis]]:
        for fold, basis in self.bases.items():
            own = np.flatnonzero(folds == fold)
            if own.size:
                yield own, basis


def turn(
    reflectors: Array, lengths: Array, values: Array, *, side: str, transposed: bool = False
) -> Array:
    """V values (side "L") or values V ("R"), V' for V where transposed, of V as LAPACK's geqrf
    leaves it.
    """
    if not values.size or not lengths.size:
        return values
    (multiply,) = scipy.linalg.get_lapack_funcs(("ormqr",), (reflectors, values))
    room = 64 * max(values.shape)
    turned, _, info = multiply(
        side, "T" if transposed else "N", reflectors, lengths, values, lwork=room
    )
    assert info == 0
    return np.asarray(turned)
