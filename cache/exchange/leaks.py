"""Features that are none: the number of the row, and the target itself under another name.

N rows, D columns, K classes.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.text import as_text

Rows = npt.NDArray[np.generic]
# Fewer rows or values could agree by chance: 0, 1 and 2 with three numbered rows, six numbers that
# happen to rise.
_LEAST_ROWS = 3
_LEAST_STEPS = 8
_LEAST_VALUES = 12
_LEAST_PER_VALUE = 5
_FIRST_ROWS = 1024  # rule out nearly every column before all rows are read


def find_row_counters(features: Rows) -> list[int]:
    """The columns of features (N, D) that count the rows: 0, 1, 2, …, or by any other step from any
    other number.

    The mean of a time series' own index is such a column, as is the time of frames.
    """
    if len(features) < _LEAST_ROWS:
        return []
    first, last = np.asarray(features[0], np.float64), np.asarray(features[-1], np.float64)
    steps = (last - first) / (len(features) - 1)
    # float32 has seven digits: of the largest number, and so of the difference of two. Less than
    # that is no step.
    digits = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(first), np.abs(last))
    is_rising = np.abs(last - first) > 16 * digits
    columns = np.flatnonzero(
        is_rising if len(features) >= _LEAST_STEPS else (steps == 1) & np.isin(first, (0, 1))
    )
    for start, stop in _blocks(len(features)):
        if not len(columns):
            break
        expected = first[columns] + np.arange(start, stop)[:, None] * steps[columns]
        difference = np.abs(np.asarray(features[start:stop][:, columns], np.float64) - expected)
        columns = columns[
            (difference <= digits[columns] + 1e-3 * np.abs(steps[columns])).all(axis=0)
        ]
    return [int(column) for column in columns]


def find_target_columns(features: Rows, target: pd.Series) -> list[int]:
    """The columns of features (N, D) that say the target and nothing else. target: N values,
    missing where unknown.

    Found are columns that have one value for each class and another for each other class; columns
    of fewer values that are still the same within each class (an indicator of one class, a mean of
    the target), where that is no chance; and, of a target of many different numbers, columns that
    rise or fall with it without exception.
    """
    rows = np.flatnonzero(target.notna().to_numpy())
    codes, classes = pd.factorize(as_text(target.iloc[rows]))
    if len(classes) < 2:
        return []
    if 2 * len(classes) <= len(rows):
        return _functions(features, rows, codes, len(classes))
    numbers = pd.to_numeric(target.iloc[rows], errors="coerce").to_numpy(np.float64)
    if len(classes) < _LEAST_VALUES or not np.isfinite(numbers).all():
        return []
    return _monotone(features, rows[np.argsort(numbers, kind="stable")])


def _functions(
    features: Rows, rows: npt.NDArray[np.intp], codes: npt.NDArray[np.intp], n_classes: int
) -> list[int]:
    """Columns that are constant within each class, and not over all."""
    first = np.zeros(n_classes, np.int64)
    first[codes[::-1]] = np.arange(len(rows))[::-1]
    of_class = features[rows[first]]  # (K, D)
    columns = np.flatnonzero((of_class != of_class[0]).any(axis=0))
    for start, stop in _blocks(len(rows)):
        if not len(columns):
            break
        expected = of_class[codes[start:stop]][:, columns]
        columns = columns[(features[rows[start:stop]][:, columns] == expected).all(axis=0)]
    found = []
    for column in columns:
        value_of_class, values = pd.factorize(of_class[:, column])
        support = np.bincount(value_of_class[codes], minlength=len(values))
        if len(values) == n_classes or support.min() >= _LEAST_PER_VALUE:
            found.append(int(column))
    return found


def _monotone(features: Rows, order: npt.NDArray[np.intp]) -> list[int]:
    """Columns that never fall, or never rise, along the rows of `order`."""
    sampled = order[np.linspace(0, len(order) - 1, min(len(order), _FIRST_ROWS)).astype(np.int64)]
    columns = np.arange(features.shape[1])
    for chosen in (sampled, order):
        steps = np.diff(np.asarray(features[chosen][:, columns], np.float64), axis=0)
        columns = columns[(steps >= 0).all(axis=0) | (steps <= 0).all(axis=0)]
        if not len(columns):
            break
    return [
        int(column)
        for column in columns
        if len(np.unique(features[order, column])) >= _LEAST_VALUES
    ]


def _blocks(rows: int) -> Iterator[tuple[int, int]]:
    """First and past-the-end row of blocks, the first of them small."""
    start, size = 0, _FIRST_ROWS
    while start < rows:
        yield start, min(rows, start + size)
        start, size = start + size, 1 << 16
