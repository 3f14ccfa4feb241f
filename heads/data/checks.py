"""Checks of features, targets, specs and weights that banks make before they start."""

from collections.abc import Sequence

import numpy as np

from headrace.cache.count_text import count_text
from headrace.heads.arrays import Array, Doubles
from headrace.heads.data.training_data import TrainingData
from headrace.heads.errors import HeadError

# Smaller weights vanish in products with float32 features; larger ones leave no digit for the
# penalty and the other rows.
MIN_WEIGHT, MAX_WEIGHT = 1e-30, 1e15


def check_finite(X: Array) -> None:
    """Raise HeadError naming the first row of X (…, N, D) with NaN or infinity."""
    flat_rows = X.reshape(-1, X.shape[-1])
    for first_row in range(0, len(flat_rows), 8192):
        is_bad = ~np.isfinite(flat_rows[first_row : first_row + 8192]).all(1)
        if is_bad.any():
            bad_row = (first_row + int(np.argmax(is_bad))) % X.shape[-2]
            raise HeadError(
                f"features of row {bad_row} are NaN or infinite: remove the row, or extract its "
                "features again"
            )


def check_specs(specs: Sequence[object], example: str) -> None:
    """Raise ValueError if there are no specs; `example` is the code of one, for the message."""
    if not len(specs):
        raise ValueError(
            "specs is empty, so that there is no head to train: give at least one, such as "
            f"{example}"
        )


def row_weights(sample_weight: Array | None, n_rows: int) -> Doubles:
    """Return the weights as (n,) float64, ones for None.

    Raises ValueError for weights that are negative or not finite, and naming the first one beyond
    MIN_WEIGHT..MAX_WEIGHT.
    """
    weight_of_row = (
        np.ones(n_rows) if sample_weight is None else np.asarray(sample_weight, np.float64)
    )
    if not (np.isfinite(weight_of_row).all() and (weight_of_row >= 0).all()):
        raise ValueError(
            "sample weights must be finite and not negative; give a row weight 0 to leave it out"
        )
    is_out_of_range = (weight_of_row != 0) & (
        (weight_of_row < MIN_WEIGHT) | (weight_of_row > MAX_WEIGHT)
    )
    if is_out_of_range.any():
        bad_row = int(np.argmax(is_out_of_range))
        raise ValueError(
            f"sample weights must be 0 or lie in {MIN_WEIGHT:g}..{MAX_WEIGHT:g}, found "
            f"{weight_of_row[bad_row]:g} for row {bad_row}: divide them by their mean, and give "
            "weight 0 to a row that is to be left out"
        )
    return weight_of_row


def check_rows(data: TrainingData) -> None:
    """Raise ValueError if shapes, labels or weights do not fit; features may still be NaN."""
    X, target, n_classes, task_kind = data.X, data.target, data.n_outputs, data.task_kind
    if X.ndim != 2 or not np.issubdtype(X.dtype, np.floating):
        raise ValueError(
            f"features must be a float matrix (rows, features), found {X.dtype} of shape {X.shape}"
        )
    if not X.shape[0] or not X.shape[1]:
        raise ValueError(
            f"features of shape {X.shape} hold nothing to train on: give at least one row and one "
            "feature"
        )
    for name in ("target", "fold", "sample_weight"):
        values = getattr(data, name)
        if values is not None and len(values) != len(X):
            raise ValueError(
                f"{name} has {count_text(len(values), 'row')} but the features have {len(X)}: pass "
                "one per row, in the same order"
            )
    if task_kind == "multi" and (
        target.shape[1:] != (n_classes,) or not np.isin(target, (0, 1)).all()
    ):
        raise ValueError(
            f"multi-label targets must be 0/1 of shape (rows, {n_classes}), found shape "
            f"{target.shape}"
        )
    if task_kind == "single" and (target.ndim != 1 or target.dtype.kind not in "iu"):
        raise ValueError(
            f"a single-label target must be (rows,) of integers, found {target.dtype} of "
            f"{target.shape}"
        )
    if task_kind == "single" and not (target.min() >= 0 and target.max() < n_classes):
        raise ValueError(
            f"class indices must lie in 0..{n_classes - 1}, found {target.min()}..{target.max()}"
        )
    if task_kind == "regression" and not np.isfinite(target).all():
        raise ValueError(
            "regression targets must be finite: leave rows without a target out of the task"
        )
    weight_of_row = row_weights(data.sample_weight, len(X))
    check_folds(data, weight_of_row)
    if not weight_of_row.any():
        raise ValueError(
            "every sample weight is 0, so that no row is left to train on: give some rows a weight"
        )


def check_folds(data: TrainingData, weight_of_row: Doubles) -> None:
    """Raise ValueError for a fold whose training rows have no weight."""
    for fold in data.folds:
        if not weight_of_row[data.fold != fold].any():
            raise ValueError(
                f"fold {fold} leaves no row with a weight to train on: use fewer folds, or add "
                "images"
            )
