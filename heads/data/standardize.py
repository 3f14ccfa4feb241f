"""Means and scales of every fold's training rows, from one look at each row.

N rows, D features, F folds. Rows fall into F + 1 groups: one per fold, and those that always train.
A fold's training rows are all groups but its own, so its moments are a merge of F groups' moments
(Chan, Golub & LeVeque 1983, eq. 2.1: sums are merged, never subtracted, because a difference of
sums of squares loses all digits at large offsets).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.data.streamed import Streamed
from headrace.heads.data.task import REFIT, TRAIN_ONLY

Array = npt.NDArray[Any]
Features = Array | Streamed  # (N, D), in memory or read from shards
ROWS_AT_ONCE = 2048  # float64 copies of this many rows stay in the caches


class NotFinite(ValueError):
    """A feature is NaN or infinite."""


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and sum of squared deviations (D,), float64, of some rows; and what each
    feature counts beside the others.
    """

    count: int
    mean: Array
    squares: Array
    emphasis: Array | None = None  # (D,): features are standardised, then multiplied by it

    @property
    def constant(self) -> Array:
        """(D,) bool: features whose variation is rounding of their mean (scikit-learn's
        StandardScaler's rule).
        """
        eps, count = np.finfo(np.float64).eps, max(self.count, 1)
        variance = self.squares / count
        bound: Array = variance <= count * eps * variance + (count * self.mean * eps) ** 2
        return bound

    @property
    def scale(self) -> Array:
        """(D,) standard deviations over the emphasis, 1 where the feature is constant."""
        deviation = np.sqrt(self.squares / max(self.count, 1))
        return np.where(
            self.constant, 1.0, deviation if self.emphasis is None else deviation / self.emphasis
        )


def moments(rows: Array, first_row: int | npt.NDArray[np.intp] = 0) -> Moments:
    """Moments of rows (n, D).

    Raises NotFinite, naming the first bad row (counted from `first_row`) and column.
    """
    wide = rows.astype(np.float64)
    mean = wide.mean(axis=0)
    if not np.isfinite(mean).all() and not np.isfinite(rows).all():
        row, column = np.argwhere(~np.isfinite(rows))[0]
        name = first_row + row if isinstance(first_row, int) else first_row[row]
        raise NotFinite(
            f"feature {column} of row {name} is {rows[row, column]}: features must be finite. Find "
            "out which image it is (the task's ids, in order) and extract it again, or leave it "
            "out of the task."
        )
    wide -= mean
    return Moments(len(rows), mean, np.einsum("nd,nd->d", wide, wide))


def scaled(rows: Array, centre: Array, factor: Array) -> Array:
    """(rows - centre) * factor of rows (n, D) of any float type, float64: widened once, not element
    by element twice.
    """
    wide = rows.astype(np.float64)
    wide -= centre
    wide *= factor
    return wide


def merge(parts: list[Moments]) -> Moments:
    """Moments of the union of disjoint groups of rows."""
    total = sum(part.count for part in parts)
    mean = sum(
        (part.mean * (part.count / max(total, 1)) for part in parts), np.zeros_like(parts[0].mean)
    )
    squares = sum(
        (part.squares + part.count * (part.mean - mean) ** 2 for part in parts), np.zeros_like(mean)
    )
    return Moments(total, mean, squares)


def chunks(rows: npt.NDArray[np.intp], size: int = ROWS_AT_ONCE) -> Iterator[npt.NDArray[np.intp]]:
    """Row numbers in runs of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def sweep(
    X: Features, fold: Array, size: int = ROWS_AT_ONCE, which: Array | None = None
) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
    """(group, row numbers) in runs of at most `size` rows of one group, every row (or those
    `which`, a mask) once.

    Runs and the rows in them come in the order in which X lies on disk, so that all groups together
    read it once.
    """
    order = X.order if isinstance(X, Streamed) else np.arange(len(X))
    if which is not None:
        order = order[which[order]]
    of_group = fold[order]
    runs = []
    for group in np.unique(of_group).tolist():
        places = np.flatnonzero(of_group == group)
        runs += [(int(part[0]), group, order[part]) for part in chunks(places, size)]
    for _, group, rows in sorted(runs, key=lambda run: run[0]):
        yield int(group), rows


def group_moments(X: Features, fold: Array) -> dict[int, Moments]:
    """Moments of each group of rows of X (N, D): a fold's held-out rows, or TRAIN_ONLY.

    Raises NotFinite.
    """
    parts: dict[int, list[Moments]] = {int(group): [] for group in np.unique(fold)}
    for group, rows in sweep(X, fold):
        parts[group].append(moments(X[rows], rows))
    return {group: merge(own) for group, own in parts.items()}


def training_moments(groups: dict[int, Moments]) -> dict[int, Moments]:
    """Moments of each fold's training rows, and of all rows under REFIT."""
    empty = Moments(0, *(np.zeros_like(next(iter(groups.values())).mean) for _ in range(2)))
    merged = {
        fold: merge([part for group, part in groups.items() if group != fold] or [empty])
        for fold in groups
        if fold != TRAIN_ONLY
    }
    merged[REFIT] = merge(list(groups.values()))
    return merged
