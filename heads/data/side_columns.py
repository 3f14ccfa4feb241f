"""Side columns: tabular columns of an image, numbers and categories, as inputs of a head.

N rows, K side columns, R input columns that encode them, after D features.

A number is one input column, standardized by all training rows; if some training rows lack it,
another column follows that is 1 for a missing value. A category is one column for each of its
levels. This encoding does not depend on a fold: every fold's own standardization undoes the common
scale, and levels that a fold has not seen are columns of zeros. The mean that is imputed for a
missing number does depend on the fold: training computes it (`fold_fills`) and adds it to the
head's weights, so prediction and exports need only these R columns.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headrace.cache.atomic_io import publish_replace
from headrace.cache.format.sealed import read_sealed_arrays, sealed_arrays
from headrace.heads.arrays import Array, Floats
from headrace.heads.errors import HeadError

# Name of this input on leaderboards and in a recipe's lists of inputs.
SIDE_COLUMNS = "side_columns"


def taps_of(inputs: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a head's inputs that are feature sets: all but the side columns."""
    return tuple(name for name in inputs if name != SIDE_COLUMNS)


class SideBlock(NamedTuple):
    """The input columns, start to stop, that encode one side column.

    For a number: its values, and a second column if some training rows lack it.
    """

    is_category: bool
    start: int
    stop: int


@dataclass(frozen=True)
class SideColumn:
    """One side column with the statistics of its training rows."""

    name: str
    # Values of a category as text, "" for a missing one; None: a number.
    levels: tuple[str, ...] | None = None
    has_missing: bool = False  # a number that some training rows lack
    center: float = 0.0  # mean of a number
    spread: float = 1.0  # standard deviation of a number

    @property
    def width(self) -> int:
        """Number of input columns that encode it."""
        return 1 + self.has_missing if self.levels is None else len(self.levels)

    @property
    def input_names(self) -> list[str]:
        """Names of the input columns."""
        if self.levels is not None:
            return [f"{self.name}={level}" for level in self.levels]
        return [self.name, f"{self.name} missing"][: self.width]


@dataclass(frozen=True, eq=False)
class SideColumns:
    """Side columns of N rows."""

    columns: tuple[SideColumn, ...]
    # (N, K) float64: a number, nan if it is missing; or the index of a category's level, nan for a
    # text that is none of the levels.
    values: Array

    def take(self, rows: Array) -> "SideColumns":
        """Return the side columns of some rows: a mask (N,), or row numbers."""
        return SideColumns(self.columns, self.values[rows])

    @property
    def n_inputs(self) -> int:
        """Number of input columns, R."""
        return sum(column.width for column in self.columns)

    @property
    def fingerprint(self) -> str:
        """First 24 hex digits of the SHA-256 of columns and values."""
        hasher = hashlib.sha256(_columns_text(self.columns).encode())
        hasher.update(np.ascontiguousarray(self.values).tobytes())
        return hasher.hexdigest()[:24]

    def as_inputs(self) -> Floats:
        """Return the input columns of a head, (N, R) float32."""
        encoded = []
        for column, values in zip(self.columns, self.values.T, strict=True):
            is_missing = np.isnan(values)
            if column.levels is not None:
                encoded.append(values[:, None] == np.arange(len(column.levels)))
                continue
            encoded.append(
                np.where(is_missing, 0, (values - column.center) / column.spread)[:, None]
            )
            if column.has_missing:
                encoded.append(is_missing[:, None])
        return np.concatenate(encoded, axis=1, dtype=np.float32, casting="unsafe")


def side_blocks(columns: Sequence[SideColumn], n_features: int) -> tuple[SideBlock, ...]:
    """Return the input columns of each side column, which follow `n_features` features."""
    stops = n_features + np.cumsum([column.width for column in columns])
    return tuple(
        SideBlock(column.levels is not None, int(stop) - column.width, int(stop))
        for column, stop in zip(columns, stops, strict=True)
    )


def imputed_numbers(blocks: Sequence[SideBlock]) -> list[int]:
    """Return the input columns of numbers that some training rows lack.

    The column after each of them is 1 where the number is missing.
    """
    numbers = (block for block in blocks if not block.is_category)
    return [number.start for number in numbers if number.stop - number.start == 2]


def fold_fills(inputs: Array, n_features: int, numbers: Sequence[int]) -> Array:
    """Return the value to impute for each number: the mean of its values in a fold's training rows.

    inputs: (n, R), the side columns of those rows. numbers: columns from `imputed_numbers`. 0 for a
    number that none of the rows has.
    """
    fills = []
    for number in numbers:
        values, is_missing = inputs[:, number - n_features], inputs[:, number - n_features + 1]
        n_values = len(inputs) - int(is_missing.sum())
        fills.append(values.sum(dtype=np.float64) / max(n_values, 1))
    return np.asarray(fills, np.float64)


def weight_with_fills(weight: Array, numbers: Sequence[int], fills: Array) -> Array:
    """Return a first layer's weight (…, D + R) for inputs in which missing numbers are 0, from the
    weight for inputs in which they are `fills`.
    """
    # weight * fill is a constant for rows that lack the number: it goes to the column that is 1
    # there.
    filled = weight.astype(np.float64)
    for number, fill in zip(numbers, fills, strict=True):
        filled[..., number + 1] += fill * filled[..., number]
    return filled.astype(weight.dtype)


def as_cells(inputs: Array, blocks: Sequence[SideBlock]) -> Array:
    """Return the side columns as table cells for scikit-learn's transformers, (n, K) float32.

    Numbers, nan if missing, and indices of levels, nan for none. inputs: (n, D + R) of heads.
    """
    cells = np.empty((len(inputs), len(blocks)), np.float32)
    for column, (is_category, start, stop) in enumerate(blocks):
        block = inputs[:, start:stop]
        if is_category:
            cells[:, column] = np.where(block.any(1), block.argmax(1), np.nan)
        else:
            is_missing = block[:, 1] > 0 if stop - start == 2 else np.zeros(len(block), np.bool_)
            cells[:, column] = np.where(is_missing, np.nan, block[:, 0])
    return cells


def columns_to_json(columns: Sequence[SideColumn]) -> list[dict[str, Any]]:
    """Return the columns as values of JSON, for the description of a model."""
    return [asdict(column) for column in columns]


def columns_from_json(described: Sequence[dict[str, Any]]) -> tuple[SideColumn, ...]:
    """Return the columns from `columns_to_json`.

    Raises TypeError, KeyError or ValueError for other values.
    """
    return tuple(
        SideColumn(
            str(fields["name"]),
            None if fields["levels"] is None else tuple(map(str, fields["levels"])),
            bool(fields["has_missing"]),
            float(fields["center"]),
            float(fields["spread"]),
        )
        for fields in described
    )


def _columns_text(columns: Sequence[SideColumn]) -> str:
    return json.dumps(columns_to_json(columns), sort_keys=True)


def save_side_columns(side: SideColumns, path: Path) -> None:
    """Write the side columns of a task's rows as a sealed `.npz`. Raises PublishFailed."""
    header = np.frombuffer(_columns_text(side.columns).encode(), np.uint8)
    publish_replace(path, sealed_arrays({"header": header, "values": side.values}))


def load_side_columns(path: Path) -> SideColumns:
    """Read the side columns that `save_side_columns` wrote. Raises HeadError."""
    try:
        stored = read_sealed_arrays(path.read_bytes())
        columns = columns_from_json(json.loads(stored["header"].tobytes()))
        return SideColumns(columns, stored["values"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HeadError(
            f"{path} has changed since it was written, or holds no side columns: {error}. "
            "`headrace run RECIPE` writes it again"
        ) from error
