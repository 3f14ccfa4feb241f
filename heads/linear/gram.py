"""Weighted products of features and targets by group of rows, from which ridge heads are solved.

N rows, D features, T target columns, x' is x transposed. A fold's products are the sum of the other
groups' products.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from headrace.heads.arrays import Array
from headrace.heads.data.standardize import Features, Moments, scaled, sweep


@dataclass(frozen=True)
class Products:
    """Weighted sums over rows x (D,) with targets y (T,), float64."""

    gram: Array  # (D, D), sum w x x'
    cross: Array  # (D, T), sum w x y'
    feature_sum: Array  # (D,), sum w x
    target_sum: Array  # (T,), sum w y
    target_squares: Array  # (T,), sum w y^2
    total_weight: float  # sum w

    def __add__(self, other: "Products") -> "Products":
        return Products(
            self.gram + other.gram,
            self.cross + other.cross,
            self.feature_sum + other.feature_sum,
            self.target_sum + other.target_sum,
            self.target_squares + other.target_squares,
            self.total_weight + other.total_weight,
        )

    def centred(self) -> "Products":
        """Return the products of x and y without their weighted means.

        `feature_sum` and `target_sum` stay those of the uncentred rows.
        """
        total_weight = self.total_weight or 1.0
        return Products(
            self.gram - np.outer(self.feature_sum, self.feature_sum) / total_weight,
            self.cross - np.outer(self.feature_sum, self.target_sum) / total_weight,
            self.feature_sum,
            self.target_sum,
            self.target_squares - self.target_sum**2 / total_weight,
            self.total_weight,
        )


def group_products(
    X: Features, Y: Array, sample_weight: Array | None, fold: Array, common: Moments
) -> dict[int, Products]:
    """Return the products of each group of rows, by its value in `fold`.

    X: (N, D), standardized by the common moments. Y: (N, T). sample_weight: (N,) or None.
    """
    n_features, n_targets = X.shape[1], Y.shape[1]

    def zero_products() -> Products:
        gram, cross = np.zeros((n_features, n_features)), np.zeros((n_features, n_targets))
        sums = np.zeros(n_targets), np.zeros(n_targets)
        return Products(gram, cross, np.zeros(n_features), *sums, 0.0)

    inverse_scale = common.inverse_scale
    groups = {int(group): zero_products() for group in np.unique(fold)}
    for group, row_index in sweep(X, fold):
        products = groups[group]
        # By the moments of all rows, so that the sums of squares keep their digits.
        z = scaled(X[row_index], common.mean, inverse_scale)
        y = Y[row_index].astype(np.float64)
        w = np.ones(len(row_index)) if sample_weight is None else sample_weight[row_index]
        products.feature_sum[...] += w @ z
        products.target_sum[...] += w @ y
        products.target_squares[...] += w @ (y * y)
        products.cross[...] += z.T @ (w[:, None] * y)
        if sample_weight is not None:
            z *= np.sqrt(w)[:, None]
        # numpy recognizes an array times its own transpose, and computes half of it (BLAS syrk).
        products.gram[...] += z.T @ z
        total_weight = products.total_weight + float(w.sum())
        groups[group] = replace(products, total_weight=total_weight)
    return groups


def sum_products(parts: Iterable[Products]) -> Products:
    """Return the products of the rows of all parts."""
    # Added, not subtracted from the total: a difference of Gram matrices may not be positive
    # definite.
    return reduce(Products.__add__, parts)
