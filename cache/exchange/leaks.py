"""Detection of columns that are no features: row numbers, and the target under another name.

N rows, D columns, K classes.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.text import as_text

FeatureArray = npt.NDArray[np.generic]
# With fewer rows or values a feature could have the pattern by chance: six numbers may happen to
# rise.
_MIN_ROWS = 3  # to be a counter at all, from 0 or 1 in steps of 1
_MIN_STEPS = 8  # rows, to be a counter with another start or step
_MIN_VALUES = 12  # distinct values of a target and of a column that rises with it
_MIN_PER_VALUE = 5  # rows of each distinct value of a column that is constant within classes
# Rows of the first block, which rule out nearly every column before all rows are read.
_FIRST_ROWS = 1024


def find_row_counters(features: FeatureArray) -> list[int]:
    """Return the columns of features (N, D) that count the rows, in any constant step.

    A table's index is such a column, as is the time of a film's frames.
    """
    if len(features) < _MIN_ROWS:
        return []
    first_row, last_row = np.asarray(features[0], np.float64), np.asarray(features[-1], np.float64)
    step_of_column = (last_row - first_row) / (len(features) - 1)
    # float32 has seven digits of the larger number, so the difference of two numbers is uncertain
    # by that much. A column that changes by less over all rows is constant.
    rounding_error = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(first_row), np.abs(last_row))
    is_rising = np.abs(last_row - first_row) > 16 * rounding_error
    column_indices = np.flatnonzero(
        is_rising
        if len(features) >= _MIN_STEPS
        else (step_of_column == 1) & np.isin(first_row, (0, 1))
    )
    for start_row, stop_row in _row_blocks(len(features)):
        if not len(column_indices):
            break
        steps, row_numbers = step_of_column[column_indices], np.arange(start_row, stop_row)
        expected_values = first_row[column_indices] + row_numbers[:, None] * steps
        values = np.asarray(features[start_row:stop_row][:, column_indices], np.float64)
        allowed_error = rounding_error[column_indices] + 1e-3 * np.abs(steps)
        is_counter = (np.abs(values - expected_values) <= allowed_error).all(axis=0)
        column_indices = column_indices[is_counter]
    return column_indices.tolist()


def find_target_columns(features: FeatureArray, target: pd.Series) -> list[int]:
    """Return the columns of features (N, D) that repeat the target. target: N values, or missing.

    Three kinds are recognized: columns with one distinct value per class; columns of fewer values
    that are constant within each class (an indicator of one class, a mean of the target), where
    that cannot be chance; and, for a target of many different numbers, columns that rise or fall
    with it without exception.
    """
    labelled_rows = np.flatnonzero(target.notna().to_numpy())
    class_codes, classes = pd.factorize(as_text(target.iloc[labelled_rows]))
    if len(classes) < 2:
        return []
    # Two rows per distinct value on average: classes. Fewer: a quantity.
    if 2 * len(classes) <= len(labelled_rows):
        return _class_constant_columns(features, labelled_rows, class_codes, len(classes))
    target_numbers = pd.to_numeric(target.iloc[labelled_rows], errors="coerce").to_numpy(np.float64)
    if len(classes) < _MIN_VALUES or not np.isfinite(target_numbers).all():
        return []
    return _monotone_columns(features, labelled_rows[np.argsort(target_numbers, kind="stable")])


def _class_constant_columns(
    features: FeatureArray,
    labelled_rows: npt.NDArray[np.intp],
    class_codes: npt.NDArray[np.intp],
    n_classes: int,
) -> list[int]:
    """Return the columns that are constant within each class but not over all rows."""
    first_row_of_class = np.zeros(n_classes, np.int64)
    # Backwards, because the last assignment to an index counts.
    first_row_of_class[class_codes[::-1]] = np.arange(len(labelled_rows))[::-1]
    class_values = features[labelled_rows[first_row_of_class]]  # (K, D)
    column_indices = np.flatnonzero((class_values != class_values[0]).any(axis=0))
    for start_row, stop_row in _row_blocks(len(labelled_rows)):
        if not len(column_indices):
            break
        expected_values = class_values[class_codes[start_row:stop_row]][:, column_indices]
        values = features[labelled_rows[start_row:stop_row]][:, column_indices]
        column_indices = column_indices[(values == expected_values).all(axis=0)]
    leaking_columns = []
    for column in column_indices:
        value_codes, distinct_values = pd.factorize(class_values[:, column])
        rows_per_value = np.bincount(value_codes[class_codes], minlength=len(distinct_values))
        if len(distinct_values) == n_classes or rows_per_value.min() >= _MIN_PER_VALUE:
            leaking_columns.append(int(column))
    return leaking_columns


def _monotone_columns(features: FeatureArray, row_order: npt.NDArray[np.intp]) -> list[int]:
    """Return the columns that never fall, or never rise, along the rows of `row_order`."""
    n_sampled = min(len(row_order), _FIRST_ROWS)
    sampled_rows = row_order[np.linspace(0, len(row_order) - 1, n_sampled).astype(np.int64)]
    column_indices = np.arange(features.shape[1])
    # A few rows rule out nearly every column, before the others are read.
    for row_subset in (sampled_rows, row_order):
        values = np.asarray(features[row_subset][:, column_indices], np.float64)
        steps = np.diff(values, axis=0)
        column_indices = column_indices[(steps >= 0).all(axis=0) | (steps <= 0).all(axis=0)]
        if not len(column_indices):
            break
    return [
        int(column)
        for column in column_indices
        if len(np.unique(features[row_order, column])) >= _MIN_VALUES
    ]


def _row_blocks(n_rows: int) -> Iterator[tuple[int, int]]:
    """Yield (start row, stop row) of blocks that cover n_rows, the first one small."""
    start_row, block_rows = 0, _FIRST_ROWS
    while start_row < n_rows:
        yield start_row, min(n_rows, start_row + block_rows)
        start_row, block_rows = start_row + block_rows, 1 << 16
