"""Linear banks beside side columns with missing numbers: what stands for them depends on the fold.

N rows, D features, R side columns.

Without missing numbers folds differ in standardisation alone, and share one copy of the rows. The
mean that stands for a missing number is no change of scale, so that each fold has rows of its own
and its heads are trained by themselves.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from headrace.heads.data.side_columns import fold_fills, fold_into_weight, imputed_numbers
from headrace.heads.data.standardize import Features
from headrace.heads.data.streamed import Streamed
from headrace.heads.data.task import REFIT, TEST, TRAIN_ONLY
from headrace.heads.data.training_data import TrainingData
from headrace.heads.spec import FitResult

# Train a bank on all folds of its data; the second argument is `refit`.
FitFolds = Callable[[TrainingData, bool], list[FitResult]]


def fit_imputed(fit: FitFolds, data: TrainingData, *, refit: bool) -> list[FitResult]:
    """Train a bank of linear heads with missing numbers at the mean of each fold's training rows.

    Heads come as from `fit`, their weights for inputs in which missing numbers are 0.
    """
    numbers = imputed_numbers(data.side)
    if not numbers:
        return fit(data, refit)
    folds = data.folds_to_fit(refit=refit)
    n_features = data.side[0].start
    rows: Features
    if isinstance(data.X, Streamed):
        rows, side = data.X, data.X.side
    else:
        rows, side = data.X.copy(), data.X[:, n_features:]
    values = [number - n_features for number in numbers]
    fits: list[list[FitResult]] = []
    for fold in folds:
        train = data.training_rows(fold)
        fills = fold_fills(side[train % len(side)], n_features, numbers)
        imputed = side.copy()
        for value, fill in zip(values, fills, strict=True):
            imputed[:, value] += side[:, value + 1] * np.float32(fill)
        if isinstance(rows, Streamed):
            rows = rows.with_side(imputed)
        else:
            rows[:, n_features:] = imputed
        is_other = (data.fold != fold) & (data.fold != TEST)
        one_fold = replace(data, X=rows, fold=np.where(is_other, TRAIN_ONLY, data.fold))
        fits.append(
            [
                _folded(head, numbers, fills)
                for head in fit(one_fold, fold == REFIT)
                if head.fold == fold
            ]
        )
    return [head for of_spec in zip(*fits, strict=True) for head in of_spec]


def _folded(head: FitResult, numbers: list[int], fills: np.ndarray) -> FitResult:
    if "weight" not in head.arrays:
        return head
    weight = fold_into_weight(head.arrays["weight"], numbers, fills)
    return replace(head, arrays={**head.arrays, "weight": weight})
