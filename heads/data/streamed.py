"""Features that stay on disk: rows of feature sets, indexed like a matrix in memory.

N rows, V views, D features, R columns of side inputs. Row r of view v is row v * N + r, as in a
stack of the views.
"""

import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from headrace.cache.feature_set import FeatureSet
from headrace.heads.arrays import Array, Floats, Index
from headrace.heads.errors import HeadError

ROWS_PER_READ = 8192  # rows read together, in the order of the disk
_EXPONENT = np.uint16(0x7C00)  # exponent bits of a float16: all ones in infinity and NaN


class StreamedRows:
    """Rows of several feature sets, concatenated, read when they are indexed, always float32.

    A bank computes the same from it as from the array in memory, because it gets the same numbers
    in the same order.

    parts: the feature sets of the columns, each a list of the views of one tap.
    content: (N,) S32 content hashes of the rows, in their order.
    spatial: keep the positions, (n, channels, h, w).

    Raises CacheError for a row that a feature set lacks.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        parts: Sequence[Sequence[FeatureSet]],
        content: npt.NDArray[np.bytes_],
        *,
        spatial: bool,
    ) -> None:
        self._parts = [
            [(feature, _positions(feature, content)) for feature in views] for views in parts
        ]
        self._rows, self.views = len(content), len(self._parts[0])
        shapes = [views[0].spec.shape for views in parts]
        map_shape = tuple(shapes[0][1:]) if spatial else ()
        column_counts = [shape[0] if spatial else math.prod(shape) for shape in shapes]
        self._columns = np.concatenate([[0], np.cumsum(column_counts)]).tolist()
        self.side = np.empty((self._rows, 0), np.float32)
        self.shape: tuple[int, ...] = (self.views * self._rows, self._columns[-1], *map_shape)
        self.ndim = len(self.shape)

    def with_side(self, side: Floats) -> "StreamedRows":
        """Return the same rows with other side columns (N, R)."""
        rows = copy.copy(self)
        rows.side = side
        rows.shape = (self.shape[0], int(self._columns[-1]) + side.shape[1], *self.shape[2:])
        return rows

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | Array) -> Floats:
        """Return rows by slice, row numbers or mask, (n, D) or (n, channels, h, w), as a copy."""
        if isinstance(key, slice):
            key = np.arange(*key.indices(len(self)))
        key = np.asarray(key)
        return self.read(np.flatnonzero(key) if key.dtype == np.bool_ else key)

    def read(self, row_numbers: Array) -> Floats:
        """Return rows by number, (n, D) or (n, channels, h, w) float32, as a copy."""
        output_rows = np.empty((len(row_numbers), *self.shape[1:]), np.float32)
        for view in range(self.views):
            view_rows: slice | Index = slice(None)
            if self.views > 1:
                view_rows = np.flatnonzero(row_numbers // self._rows == view)
            local_rows = row_numbers[view_rows] - view * self._rows
            for column_part, first_column, end_column in zip(
                self._parts, self._columns[:-1], self._columns[1:], strict=True
            ):
                feature, positions = column_part[view]
                if self._is_one_block:
                    # Into the result itself, without a copy of the part.
                    feature.read(
                        positions[local_rows],
                        np.float32,
                        out=output_rows.reshape(len(row_numbers), *feature.spec.shape),
                    )
                else:
                    part_rows = feature.read(positions[local_rows], np.float32)
                    output_rows[view_rows, first_column:end_column] = part_rows.reshape(
                        len(part_rows), end_column - first_column, *self.shape[2:]
                    )
        if self.side.shape[1]:
            output_rows[:, self._columns[-1] :] = self.side[row_numbers % self._rows]
        return output_rows

    @property
    def _is_one_block(self) -> bool:
        """Whether a row is just a row of one feature set."""
        return len(self._parts) == 1 and self.views == 1 and not self.side.shape[1]

    def stored(self, rows: Array) -> Array:
        """Return rows by number, (n, D), as a copy.

        They have their storage dtype if all columns come from one feature set, else float32.
        """
        if not self._is_one_block:
            return self.read(rows)
        feature, positions = self._parts[0][0]
        return feature.read(positions[rows], None).reshape(len(rows), -1)

    @property
    def order(self) -> Index:
        """Row numbers (V * N,) in the order in which the first feature set has the rows on disk."""
        first_part = self._parts[0]
        return np.concatenate(
            [view * self._rows + np.argsort(first_part[view][1]) for view in range(self.views)]
        )

    def prefetch(self, row_numbers: Index) -> None:
        """Have the operating system read these rows from disk, without waiting for them."""
        for column_part in self._parts:
            for view, (feature, positions) in enumerate(column_part):
                feature.prefetch(
                    positions[row_numbers[row_numbers // self._rows == view] - view * self._rows]
                )

    def check_finite(self) -> None:
        """Raise HeadError naming the feature set and the image of the first NaN or infinity."""
        for column_part in self._parts:
            for feature, positions in column_part:
                if feature.spec.dtype == "uint8":
                    continue  # decoded with finite scales, so always finite
                for start in range(0, len(positions), ROWS_PER_READ):
                    sorted_positions = np.sort(positions[start : start + ROWS_PER_READ])
                    stored_rows = feature.read(sorted_positions, None).reshape(
                        len(sorted_positions), -1
                    )
                    # numpy's isfinite is ten times slower on float16 than comparing the bits.
                    if stored_rows.dtype == np.float16:
                        is_bad = ((stored_rows.view(np.uint16) & _EXPONENT) == _EXPONENT).any(1)
                    else:
                        is_bad = ~np.isfinite(stored_rows).all(1)
                    if is_bad.any():
                        raise not_finite(
                            feature,
                            feature.content_hashes()[sorted_positions[np.argmax(is_bad)]],
                            int(is_bad.sum()),
                        )


class StreamedView:
    """One view of streamed rows, indexed like `X[view]` of a stack of arrays."""

    def __init__(self, rows: StreamedRows, number: int) -> None:
        self._all, self._first = rows, number * (len(rows) // rows.views)

    def __getitem__(self, rows: Array) -> Floats:
        return self._all.read(rows + self._first)


class StreamedStack:
    """Streamed rows in the shape that networks take, (V, N, D, ...), iterated view by view."""

    def __init__(self, rows: StreamedRows) -> None:
        self.rows = rows
        self.shape = (rows.views, len(rows) // rows.views, *rows.shape[1:])
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.rows.views

    def __iter__(self) -> Iterator[StreamedView]:
        return (StreamedView(self.rows, number) for number in range(self.rows.views))


def not_finite(feature: FeatureSet, content_hash: bytes, n_rows: int) -> HeadError:
    """Return the error for n_rows rows with NaN or infinity, the first of image `content_hash`."""
    return HeadError(
        f"{feature.path} ({feature.spec.name}): the row of image {content_hash.decode()} and "
        f"{n_rows - 1} more hold NaN or infinite features: extract them again"
    )


def _positions(feature: FeatureSet, content_hashes: npt.NDArray[np.bytes_]) -> Index:
    row_positions = feature.locate(content_hashes)
    if (row_positions < 0).any():
        # Called for its CacheError, which names the missing images.
        feature.load(content_hashes[row_positions < 0][:3])
    return row_positions
