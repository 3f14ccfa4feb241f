"""Weighted products of features and targets, group by group: all that ridge regression needs to
know of the rows.

N rows, D features, T target columns. Rows are centred and scaled once with the moments of all rows,
so that the sums of squares keep their digits. A fold's products are the sum of the other groups'
(added, not subtracted: a difference of Gram matrices can lose positive definiteness).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.data.standardize import Features, scaled, sweep

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
        """The same with the weighted means of x and y taken out; `total` and `targets` keep the
        sums that were.
        """
        mass = self.mass or 1.0
        return Products(
            self.gram - np.outer(self.total, self.total) / mass,
            self.cross - np.outer(self.total, self.targets) / mass,
            self.total,
            self.targets,
            self.squares - self.targets**2 / mass,
            self.mass,
        )


def group_products(
    X: Features, Y: Array, weight: Array | None, fold: Array, centre: Array, factor: Array
) -> dict[int, Products]:
    """Products of each group of rows of X (N, D), as (x - centre) * factor, and Y (N, T), with
    weight (N,) or all one.
    """
    dim, targets = X.shape[1], Y.shape[1]

    def nothing() -> Products:
        gram, cross = np.zeros((dim, dim)), np.zeros((dim, targets))
        return Products(gram, cross, np.zeros(dim), np.zeros(targets), np.zeros(targets), 0.0)

    groups = {int(group): nothing() for group in np.unique(fold)}
    for group, rows in sweep(X, fold):
        own = groups[group]
        z = scaled(X[rows], centre, factor)
        y = Y[rows].astype(np.float64)
        w = np.ones(len(rows)) if weight is None else weight[rows]
        own.total[...] += w @ z
        own.targets[...] += w @ y
        own.squares[...] += w @ (y * y)
        own.cross[...] += z.T @ (w[:, None] * y)
        if weight is not None:
            z *= np.sqrt(w)[:, None]
        own.gram[...] += z.T @ z  # one array and its own transpose: BLAS computes half of it (syrk)
        groups[group] = replace(own, mass=own.mass + float(w.sum()))
    return groups


def add_up(parts: Iterable[Products]) -> Products:
    """Their sum."""
    return reduce(lambda one, other: one + other, parts)
