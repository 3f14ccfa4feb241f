"""Means and scales of every fold's training rows, from one pass over the rows.

N rows, D features, F folds. Rows belong to F + 1 groups: one per fold, and those that always train.
A fold's training rows are all groups except its own, so its moments are merged from those of F
groups (Chan, Golub & LeVeque 1983, eq. 2.1).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from headrace.heads.arrays import Array, Index
from headrace.heads.data.streamed import StreamedRows
from headrace.heads.data.task import REFIT, TRAIN_ONLY

Features = Array | StreamedRows  # (N, D), in memory or read from shards
ROWS_AT_ONCE = 2048  # so few that their float64 copies stay in the processor's caches


@dataclass(frozen=True)
class Moments:
    """Count, mean and squared deviations of some rows, and how they are standardized."""

    count: int
    mean: Array  # (D,) float64
    squares: Array  # (D,) float64, sums of squared deviations
    emphasis: Array | None = None  # (D,): features are standardized, then multiplied by it
    # {feature: value to impute where the next feature is 1}; the rows, and `mean`, have 0 there.
    fills: Mapping[int, float] = field(default_factory=dict)

    @property
    def constant(self) -> Array:
        """Which features (D,) vary only by rounding, as in StandardScaler."""
        # The error bound of a variance computed in two passes, as in scikit-learn's
        # `_is_constant_feature`.
        eps, count = np.finfo(np.float64).eps, max(self.count, 1)
        variance = self.squares / count
        return np.asarray(variance <= count * eps * variance + (count * self.mean * eps) ** 2)

    @property
    def scale(self) -> Array:
        """Standard deviations (D,) divided by the emphasis; 1 for constant features."""
        deviation = np.sqrt(self.squares / max(self.count, 1))
        if self.emphasis is not None:
            deviation /= self.emphasis
        return np.where(self.constant, 1.0, deviation)

    @property
    def inverse_scale(self) -> Array:
        """Factors (D,) that standardize centred features; 0 for constant ones."""
        return np.where(self.constant, 0.0, 1.0 / self.scale)


def moments(rows: Array, first_row: int | Index = 0) -> Moments:
    """Return the moments of rows (n, D).

    first_row: number of the first row, or the n row numbers, for messages.

    Raises ValueError, naming the first row and column that is NaN or infinite.
    """
    wide_rows = rows.astype(np.float64)
    row_mean = wide_rows.mean(axis=0)
    # One value that is not finite makes its column's mean so: the rows are looked at only then.
    if not np.isfinite(row_mean).all() and not np.isfinite(rows).all():
        bad_row, column_index = np.argwhere(~np.isfinite(rows))[0]
        row_number = first_row + bad_row if isinstance(first_row, int) else first_row[bad_row]
        # Not a HeadError, which would end the whole bank: each of its heads fails by itself.
        raise ValueError(
            f"feature {column_index} of row {row_number} is {rows[bad_row, column_index]}: "
            "features must be finite. Find out which image it is (the task's ids, in order) and "
            "extract it again, or leave it out of the task."
        )
    # Centred first: sums of squares less the squared mean would cancel for a large common offset.
    wide_rows -= row_mean
    return Moments(len(rows), row_mean, np.einsum("nd,nd->d", wide_rows, wide_rows))


def scaled(rows: Array, center: Array, factor: Array) -> Array:
    """Return (rows - centre) * factor, float64, of rows (n, D) of any float type."""
    wide_rows = rows.astype(np.float64)
    wide_rows -= center
    wide_rows *= factor
    return wide_rows


def merge(moments_of_parts: list[Moments]) -> Moments:
    """Return the moments of the union of disjoint groups of rows."""
    n_rows = sum(part.count for part in moments_of_parts)
    mean = np.zeros_like(moments_of_parts[0].mean)
    for part in moments_of_parts:
        mean += part.mean * (part.count / max(n_rows, 1))
    squares = np.zeros_like(mean)
    for part in moments_of_parts:
        squares += part.squares + part.count * (part.mean - mean) ** 2
    return Moments(n_rows, mean, squares)


def chunks(row_numbers: Index, chunk_size: int = ROWS_AT_ONCE) -> Iterator[Index]:
    """Yield row numbers in chunks of at most `chunk_size`."""
    for chunk_start in range(0, len(row_numbers), chunk_size):
        yield row_numbers[chunk_start : chunk_start + chunk_size]


def sweep(
    X: Features, fold_of_row: Array, chunk_size: int = ROWS_AT_ONCE, row_mask: Array | None = None
) -> Iterator[tuple[int, Index]]:
    """Yield (group, row numbers) in chunks of at most `chunk_size` rows of one group.

    Every row, or every row of `row_mask` (N,), comes once. Chunks, and the rows in them, are in the
    order in which X lies on disk, so all groups together read it once.
    """
    row_order = X.order if isinstance(X, StreamedRows) else np.arange(len(X))
    if row_mask is not None:
        row_order = row_order[row_mask[row_order]]
    group_of_row = fold_of_row[row_order]
    group_chunks = []
    for group in np.unique(group_of_row).tolist():
        group_positions = np.flatnonzero(group_of_row == group)
        group_chunks += [
            (int(positions[0]), group, row_order[positions])
            for positions in chunks(group_positions, chunk_size)
        ]
    for _, group, row_numbers in sorted(group_chunks, key=lambda chunk: chunk[0]):
        yield int(group), row_numbers


def group_moments(X: Features, fold_of_row: Array) -> dict[int, Moments]:
    """Return the moments of each group of rows of X (N, D): a fold's held-out rows, or TRAIN_ONLY.

    Raises ValueError where `moments` does.
    """
    parts_of_group: dict[int, list[Moments]] = {int(group): [] for group in np.unique(fold_of_row)}
    for group, row_numbers in sweep(X, fold_of_row):
        parts_of_group[group].append(moments(X[row_numbers], row_numbers))
    return {group: merge(parts) for group, parts in parts_of_group.items()}


def training_moments(groups: dict[int, Moments]) -> dict[int, Moments]:
    """Return the moments of each fold's training rows, and of all rows under REFIT."""
    zeros = np.zeros_like(next(iter(groups.values())).mean)
    # Merged, never subtracted from those of all rows: a difference of sums of squares loses all
    # digits at large offsets. A fold that is the only group has no training rows.
    no_rows = Moments(0, zeros, zeros)
    return {
        fold: merge([part for group, part in groups.items() if group != fold] or [no_rows])
        for fold in (*groups, REFIT)
        if fold != TRAIN_ONLY
    }
