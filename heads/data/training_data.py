"""The training rows of a bank of heads, in one value.

N rows, V views, D features, C outputs (classes, labels or targets).
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from headrace.heads.arrays import Array, Index
from headrace.heads.data.side_columns import SideBlock
from headrace.heads.data.standardize import Features
from headrace.heads.data.streamed import StreamedRows
from headrace.heads.data.task import REFIT, TEST, TaskKind


@dataclass(frozen=True)
class TrainingData:
    """Features, targets, folds and weights: the argument of every `fit`.

    X: (N, D) float; (V, N, D) with V views of each row; maps (N, channels, h, w) or (V, N,
    channels, h, w); or such rows streamed from shards.
    target: (N,) int class indices ("single"), (N, C) 0/1 labels ("multi"), or (N, C) float values
    ("regression").
    fold: (N,) int, the fold that holds the row out, TRAIN_ONLY or TEST.
    n_outputs: C.
    sample_weight: (N,), at least 0; None is 1 for every row.
    band_widths: number of features of each tap in X, for specs that are `banded`; () for one tap.
    n_views: more than 1 if the rows of X are N // n_views images, all of one view after another.
    side: the side columns, the last columns of X.
    unit: (N,) labels, equal for the rows of one bag, for kinds that take units.
    """

    X: Features
    target: Array
    fold: Array
    n_outputs: int
    task_kind: TaskKind = "single"
    sample_weight: Array | None = None
    band_widths: tuple[int, ...] = ()
    n_views: int = 1
    side: tuple[SideBlock, ...] = ()
    unit: Array | None = None

    @property
    def weights(self) -> Array | None:
        """The sample weights (N,) float64; None if all are 1, to save the products with them."""
        if self.sample_weight is None or (self.sample_weight == 1).all():
            return None
        return np.asarray(self.sample_weight, np.float64)

    @property
    def folds(self) -> list[int]:
        """The folds that hold rows out, ascending."""
        return [int(fold) for fold in np.unique(self.fold) if fold >= 0]

    def folds_to_fit(self, *, refit: bool) -> list[int]:
        """Return the folds of the heads of one spec, in the order of a bank's results."""
        return [*self.folds, REFIT] if refit else self.folds

    def held_out_rows(self, fold: int) -> Index:
        """Return the row numbers that a fold holds out; none for REFIT."""
        return np.flatnonzero(self.fold == fold)

    def training_rows(self, fold: int) -> Index:
        """Return the row numbers that a fold's head may learn from: all others except test rows."""
        return np.flatnonzero((self.fold != fold) & (self.fold != TEST))

    def one_row_per_view(self) -> "TrainingData":
        """Return the data with each view of an image as a row of its own, of weight 1 / n_views."""
        rows: Features
        if isinstance(self.X, StreamedRows):
            n_views, rows = self.X.views, self.X
        else:
            n_views = len(self.X) if self.X.ndim == 3 else 1
            rows = self.X.reshape(-1, self.X.shape[-1])
        if n_views == 1:
            return dataclasses.replace(self, X=rows)
        row_of_view = np.tile(np.arange(len(self.fold)), n_views)
        weight = np.ones(len(self.fold)) if self.sample_weight is None else self.sample_weight
        return dataclasses.replace(
            self,
            X=rows,
            target=self.target[row_of_view],
            fold=self.fold[row_of_view],
            # Shares of one row, so that a regularization strength means the same for any n_views.
            sample_weight=weight[row_of_view] / n_views,
            n_views=n_views,
            unit=None if self.unit is None else self.unit[row_of_view],
        )
