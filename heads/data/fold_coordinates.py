"""Coordinates of each fold, its feature scales and imputed values, relative to common ones.

D features, K numbers that some rows lack.

All folds share one copy of the rows, z (D,) in common coordinates. A head of fold f is penalized
for its weights in the coordinates of its own training rows: features are divided by their deviation
there, and missing numbers are imputed by the mean there. Both are linear: a number's column v is 0
where the number is missing, and the next column m is 1 there, so v + fill m is the imputed number.
With the scales s of the common coordinates, c = fill s_m / s_v, and the ratio r (D,) of the fold's
scales to the common ones, a row in the fold's coordinates is z M^-1: (z_v + c z_m) / r_v for an
imputed number, z / r otherwise. Weights w for z are M w in the fold's coordinates: r_m (w_m - c
w_v), and r w otherwise. So folds differ only in the penalty |M w|^2.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.heads.arrays import Array, Index
from headrace.heads.data.side_columns import fold_fills, imputed_numbers
from headrace.heads.data.standardize import Moments, group_moments, training_moments
from headrace.heads.data.streamed import StreamedRows
from headrace.heads.data.task import REFIT
from headrace.heads.data.training_data import TrainingData


@dataclass(frozen=True)
class FoldCoordinates:
    """The matrix M of a fold. Methods take and return (…, D)."""

    ratio: Array  # r (D,); infinite for a feature that is left out
    numbers: Index  # (K,) the columns v of the numbers that some rows lack
    fills: Array  # c (K,)

    def rows(self, common: Array) -> Array:
        """Return rows z M^-1. The same product converts gradients for w to those for M w."""
        rows = common / self.ratio
        fills = self.fills / self.ratio[self.numbers]
        rows[..., self.numbers] += common[..., self.numbers + 1] * fills
        return np.asarray(rows)

    def weights(self, common: Array) -> Array:
        """Return M w, whose square is penalized."""
        weights = common * self.ratio
        fills = self.fills * self.ratio[self.numbers + 1]
        weights[..., self.numbers + 1] -= common[..., self.numbers] * fills
        return np.asarray(weights)

    def common_weights(self, weights: Array) -> Array:
        """Return w from M w."""
        common = weights / self.ratio
        common[..., self.numbers + 1] += common[..., self.numbers] * self.fills
        return np.asarray(common)

    def penalty_gradient(self, common: Array) -> Array:
        """Return M'M w, half the gradient of |M w|^2."""
        gradient = common * self.ratio**2
        fills = self.fills * self.ratio[self.numbers + 1] ** 2
        gradient[..., self.numbers + 1] -= common[..., self.numbers] * fills
        gradient[..., self.numbers] -= gradient[..., self.numbers + 1] * self.fills
        return np.asarray(gradient)

    def columns(self, start: int, stop: int) -> "FoldCoordinates":
        """Return the coordinates of the columns from start to stop.

        A number whose next column is not among them is not imputed.
        """
        inside = (start <= self.numbers) & (self.numbers + 1 < stop)
        return FoldCoordinates(
            self.ratio[start:stop], self.numbers[inside] - start, self.fills[inside]
        )


def fold_coordinates(
    fold: Moments,
    common: Moments,
    fold_scale: Array | float,
    common_scale: Array | float,
    *,
    constant_ratio: float = 1.0,
    dtype: Any = np.float64,
) -> FoldCoordinates:
    """Return the coordinates of a fold.

    fold, common: moments of the fold's training rows and of the rows of the common coordinates.
    fold_scale, common_scale: their scales (D,).
    constant_ratio: the ratio of features that are constant in the rows of either.
    """
    is_constant = fold.constant | common.constant
    ratio = np.where(is_constant, constant_ratio, fold_scale / common_scale)
    numbers = np.array(list(fold.fills), np.intp)
    scale = np.broadcast_to(common_scale, is_constant.shape)
    fills = np.array(list(fold.fills.values())) * scale[numbers + 1] / scale[numbers]
    # A constant column is 0 in common coordinates and has no weight, so there is nothing to impute.
    fills[common.constant[numbers] | common.constant[numbers + 1]] = 0
    return FoldCoordinates(ratio.astype(dtype), numbers, fills.astype(dtype))


def fold_moments(data: TrainingData) -> dict[int, Moments]:
    """Return the moments of each fold's training rows, and of all rows under REFIT.

    The deviations of numbers that some rows lack are those of the imputed values.

    Raises ValueError, naming the row, for features that are not finite.
    """
    scaling = training_moments(group_moments(data.X, np.asarray(data.fold, np.int64)))
    numbers = imputed_numbers(data.side)
    if not numbers:
        return scaling
    n_features = data.side[0].start
    side = data.X.side if isinstance(data.X, StreamedRows) else data.X[:, n_features:]
    missing_columns = np.asarray(numbers) + 1  # m, for every v in `numbers`
    variance = scaling[REFIT].squares[missing_columns] / scaling[REFIT].count
    variance[variance == 0] = 1
    for fold, moments in scaling.items():
        inputs = side[data.training_rows(fold) % len(side)]
        fills = fold_fills(inputs, n_features, numbers)
        squares = moments.squares.copy()
        # A column m that is 0 in all training rows of the fold is not left out as a constant: in
        # other rows its weight is fill times that of the number. It gets the deviation of all rows.
        squares[missing_columns] = np.where(
            squares[missing_columns] == 0, variance * moments.count, squares[missing_columns]
        )
        for number, fill in zip(numbers, fills, strict=True):
            values = inputs[inputs[:, number + 1 - n_features] == 0, number - n_features]
            squares[number] = np.square(values - fill).sum()
        scaling[fold] = dataclasses.replace(
            moments, squares=squares, fills=dict(zip(numbers, fills.tolist(), strict=True))
        )
    return scaling
