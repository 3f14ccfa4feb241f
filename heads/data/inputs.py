"""Checks of the training data of linear banks."""

import numpy as np

from headrace.cache.count_text import count_text
from headrace.heads.data.checks import row_weights
from headrace.heads.data.training_data import TrainingData


def check_rows(data: TrainingData) -> None:
    """Raise ValueError if shapes, labels or weights do not fit; features may still be NaN."""
    X, target, n_classes, fold_of_row = data.X, data.target, data.n_outputs, data.fold
    task_kind, sample_weight = data.task_kind, data.sample_weight
    if X.ndim != 2 or not np.issubdtype(X.dtype, np.floating):
        raise ValueError(
            f"features must be a float matrix (rows, features), found {X.dtype} of shape {X.shape}"
        )
    if not X.shape[0] or not X.shape[1]:
        raise ValueError(
            f"features of shape {X.shape} hold nothing to train on: give at least one row and one "
            "feature"
        )
    for argument_name, argument_values in (
        ("target", target),
        ("fold", fold_of_row),
        ("sample_weight", sample_weight),
    ):
        if argument_values is not None and len(argument_values) != len(X):
            raise ValueError(
                f"{argument_name} has {count_text(len(argument_values), 'row')} but the features "
                f"have {len(X)}: pass one per row, in the same order"
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
    if (
        task_kind == "single"
        and len(target)
        and not (target.min() >= 0 and target.max() < n_classes)
    ):
        raise ValueError(
            f"class indices must lie in 0..{n_classes - 1}, found {target.min()}..{target.max()}"
        )
    if task_kind == "regression" and not np.isfinite(target).all():
        raise ValueError(
            "regression targets must be finite: leave rows without a target out of the task"
        )
    weight_of_row = row_weights(sample_weight, len(X))
    for fold_number in np.unique(fold_of_row).tolist():
        if fold_number >= 0 and not weight_of_row[fold_of_row != fold_number].any():
            raise ValueError(
                f"fold {fold_number} leaves no row with a weight to train on: use fewer folds, or "
                "add images"
            )
    if not weight_of_row.any():
        raise ValueError(
            "every sample weight is 0, so that no row is left to train on: give some rows a weight"
        )
