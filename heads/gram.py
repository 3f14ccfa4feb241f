"""Weighted products of features and targets, group by group: all that ridge regression needs to know of the rows.

N rows, D features, T target columns. Rows are centred and scaled once with the moments of all rows, so that the sums of
squares keep their digits. A fold's products are the sum of the other groups' (added, not subtracted: a difference of
Gram matrices can lose positive definiteness).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.standardize import chunks

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Products:
    """Weighted sums over some rows x (D,) with targets y (T,), float64."""

    gram: Array  # (D, D), sum w x x'
    cross: Array  # (D, T), sum w x y'
    total: Array  # (D,), sum w x
    targets: Array  # (T,), sum w y
    squares: Array  # (T,), sum w y^2
    mass: float  # sum w

    def __add__(self, other: "Products") -> "Products":
        return Products(
            self.gram + other.gram,
            self.cross + other.cross,
            self.total + other.total,
            self.targets + other.targets,
            self.squares + other.squares,
            self.mass + other.mass,
        )

    def centred(self) -> "Products":
        """The same with the weighted means of x and y taken out; `total` and `targets` keep the sums that were."""
        mass = self.mass or 1.0
        return Products(
            self.gram - np.outer(self.total, self.total) / mass,
            self.cross - np.outer(self.total, self.targets) / mass,
            self.total,
            self.targets,
            self.squares - self.targets**2 / mass,
            self.mass,
        )


def products(
    X: Array, Y: Array, weight: Array | None, rows: npt.NDArray[np.intp], centre: Array, factor: Array
) -> Products:
    """Products of the given rows of X (N, D), as (x - centre) * factor, and Y (N, T), with weight (N,) or all one."""
    dim = X.shape[1]
    gram, cross, total = np.zeros((dim, dim)), np.zeros((dim, Y.shape[1])), np.zeros(dim)
    targets, squares, mass = np.zeros(Y.shape[1]), np.zeros(Y.shape[1]), 0.0
    for part in chunks(rows):
        z = (X[part] - centre) * factor
        y = Y[part].astype(np.float64)
        w = None if weight is None else weight[part]
        total += z.sum(0) if w is None else w @ z
        targets += y.sum(0) if w is None else w @ y
        squares += np.einsum("nt,nt->t", y, y) if w is None else w @ (y * y)
        mass += len(part) if w is None else float(w.sum())
        cross += z.T @ (y if w is None else w[:, None] * y)
        if w is not None:
            z *= np.sqrt(w)[:, None]
        gram += z.T @ z  # one array and its own transpose: BLAS computes half of it (syrk)
    return Products(gram, cross, total, targets, squares, mass)


def add_up(parts: Iterable[Products]) -> Products:
    """Their sum."""
    return reduce(lambda one, other: one + other, parts)
