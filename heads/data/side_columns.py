"""Tabular columns beside the features of an image: numbers and categories as a head's input.

N rows, K side columns, R columns that stand for them in a head's input, behind its features.

A number is one column, in units of its training rows' mean and deviation; where training rows lack
it, a column that is 1 for a missing value stands behind it. A category is one column for each of
its levels. So far nothing depends on a fold: units are a change of scale that every fold's own
standardisation undoes, and levels that a fold has not seen are columns of zeros to it. What does
depend on the fold, the mean that stands for a missing number, is left to training (`fold_fills`)
and folded into a head's weights, so that prediction and exports need these R columns and no more.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.cache.atomic_io import publish_replace
from headrace.cache.errors import HeadraceError
from headrace.cache.format.sealed import read_sealed_arrays, sealed_arrays

Array = npt.NDArray[Any]

# The name of the input that they are, on leaderboards and in a recipe's lists of inputs.
SIDE_COLUMNS = "side_columns"


def taps_of(inputs: Sequence[str]) -> tuple[str, ...]:
    """Return the feature sets among the names of a head's inputs."""
    return tuple(name for name in inputs if name != SIDE_COLUMNS)


class BadSideColumns(HeadraceError, ValueError):
    """The file holds no side columns, or others than were written."""


class SideBlock(NamedTuple):
    """The columns of a head's input that stand for one side column.

    start, stop: columns of the input; of a number its values, and behind them, where training rows
    lack some, what is 1 for a missing one.
    """

    is_category: bool
    start: int
    stop: int


@dataclass(frozen=True)
class SideColumn:
    """One column, as its training rows have it.

    levels: of a category, its values as text, an empty one for a missing value; None: a number.
    """

    name: str
    levels: tuple[str, ...] | None = None
    has_missing: bool = False  # a number that some training rows lack
    center: float = 0.0  # of a number: mean and
    spread: float = 1.0  # standard deviation of the training rows

    @property
    def width(self) -> int:
        """Columns of a head's input that stand for it."""
        return 1 + self.has_missing if self.levels is None else len(self.levels)

    @property
    def input_names(self) -> list[str]:
        """Names of these columns."""
        if self.levels is not None:
            return [f"{self.name}={level}" for level in self.levels]
        return [self.name, f"{self.name} missing"][: self.width]


@dataclass(frozen=True, eq=False)
class SideColumns:
    """Side columns of some rows.

    values: (N, K) float64. Of a number, nan where it is missing; of a category, the position in its
    levels, nan for none of them.
    """

    columns: tuple[SideColumn, ...]
    values: Array

    def take(self, rows: Array) -> "SideColumns":
        """Return those of some rows: a mask (N,), or row numbers."""
        return SideColumns(self.columns, self.values[rows])

    @property
    def n_inputs(self) -> int:
        """R, columns of a head's input."""
        return sum(column.width for column in self.columns)

    @property
    def fingerprint(self) -> str:
        """First 24 hex digits of the SHA-256 of columns and values."""
        hasher = hashlib.sha256(_columns_text(self.columns).encode())
        hasher.update(np.ascontiguousarray(self.values).tobytes())
        return hasher.hexdigest()[:24]

    def as_inputs(self) -> npt.NDArray[np.float32]:
        """Return (N, R) float32, the columns of a head's input."""
        parts = []
        for column, values in zip(self.columns, self.values.T, strict=True):
            is_missing = np.isnan(values)
            if column.levels is not None:
                parts.append(values[:, None] == np.arange(len(column.levels)))
                continue
            parts.append(np.where(is_missing, 0, (values - column.center) / column.spread)[:, None])
            if column.has_missing:
                parts.append(is_missing[:, None])
        return np.concatenate(parts, axis=1, dtype=np.float32, casting="unsafe")


def side_blocks(columns: Sequence[SideColumn], n_features: int) -> tuple[SideBlock, ...]:
    """Return where each column stands in an input of `n_features` features and the columns."""
    stops = n_features + np.cumsum([column.width for column in columns])
    return tuple(
        SideBlock(column.levels is not None, int(stop) - column.width, int(stop))
        for column, stop in zip(columns, stops, strict=True)
    )


def imputed_numbers(blocks: Sequence[SideBlock]) -> list[int]:
    """Return the input columns of numbers that training rows lack; the next one says where."""
    return [
        block.start for block in blocks if not block.is_category and block.stop - block.start == 2
    ]


def fold_fills(inputs: Array, n_features: int, numbers: Sequence[int]) -> Array:
    """Return what stands for a missing value of each number: the mean of the values that there are.

    inputs: (n, R), the side columns of a fold's training rows. A number that none of them has is 0.
    """
    fills = []
    for number in numbers:
        values, is_missing = inputs[:, number - n_features], inputs[:, number - n_features + 1]
        n_values = len(inputs) - int(is_missing.sum())
        fills.append(values.sum(dtype=np.float64) / max(n_values, 1))
    return np.asarray(fills, np.float64)


def fold_into_weight(weight: Array, numbers: Sequence[int], fills: Array) -> Array:
    """Return a first layer's weight (…, D + R) for inputs where missing numbers are 0, from one for
    inputs where they are `fills`.
    """
    folded = weight.astype(np.float64)
    for number, fill in zip(numbers, fills, strict=True):
        folded[..., number + 1] += fill * folded[..., number]
    return folded.astype(weight.dtype)


def as_cells(inputs: Array, blocks: Sequence[SideBlock]) -> Array:
    """Return (n, K) cells as scikit-learn's transformers take them: numbers, nan where missing, and
    positions of levels, nan for none.

    inputs: (n, D + R) of heads.
    """
    cells = np.empty((len(inputs), len(blocks)), np.float32)
    for place, (is_category, start, stop) in enumerate(blocks):
        part = inputs[:, start:stop]
        if is_category:
            cells[:, place] = np.where(part.any(1), part.argmax(1), np.nan)
        else:
            is_missing = part[:, 1] > 0 if stop - start == 2 else np.zeros(len(part), np.bool_)
            cells[:, place] = np.where(is_missing, np.nan, part[:, 0])
    return cells


def columns_to_json(columns: Sequence[SideColumn]) -> list[dict[str, Any]]:
    """Return what a model's description says of its side columns."""
    return [asdict(column) for column in columns]


def columns_from_json(described: Sequence[dict[str, Any]]) -> tuple[SideColumn, ...]:
    """Inverse of `columns_to_json`. Raises TypeError, KeyError and ValueError for other values."""
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
    """Publish the columns of a task's rows as a sealed `.npz`. Raises PublishFailed."""
    header = np.frombuffer(_columns_text(side.columns).encode(), np.uint8)
    publish_replace(path, sealed_arrays({"header": header, "values": side.values}))


def load_side_columns(path: Path) -> SideColumns:
    """Inverse of `save_side_columns`. Raises BadSideColumns."""
    try:
        stored = read_sealed_arrays(path.read_bytes())
        columns = columns_from_json(json.loads(stored["header"].tobytes()))
        return SideColumns(columns, stored["values"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadSideColumns(
            f"{path} has changed since it was written, or holds no side columns: {error}. "
            "`headrace run RECIPE` writes it again"
        ) from error
