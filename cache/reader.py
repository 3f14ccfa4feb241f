"""Rows from the shards of a feature set into arrays: verified when first touched, then mapped.

N rows in S shards, n rows requested, V values per row, *shape the shape of one row.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.checksum import VerifiedShards
from headrace.cache.errors import ShardMissing
from headrace.cache.format.compression import read_compressed_rows
from headrace.cache.format.encoding import NUMPY_DTYPES, decode_rows
from headrace.cache.format.float16 import float16_to_float32
from headrace.cache.format.validate import ShardLayout
from headrace.cache.manifest import ShardEntry
from headrace.cache.mapping import MappedRows
from headrace.cache.publish import shard_path
from headrace.cache.spec import FeatureSpec


class ShardReader:
    """The shards of one feature set.

    Every method verifies the shards it needs and raises ShardMissing, ShardCorrupt or
    ShardUnreadable.
    """

    def __init__(self, path: Path, spec: FeatureSpec, entries: Sequence[ShardEntry]) -> None:
        self._path, self._spec, self._entries = path, spec, entries
        rows_per_shard = np.array([entry.rows for entry in entries], np.int64)
        #: (S + 1,): shard i holds the rows first_row[i] to first_row[i + 1].
        self.first_row = np.concatenate([[0], np.cumsum(rows_per_shard)]).astype(np.int64)
        self._values_per_row = int(np.prod(spec.shape, dtype=np.int64))
        self._layouts: dict[int, ShardLayout] = {}
        # (S,) each: arrays, so that a batch looks up all of its shards in one operation.
        self._is_ready = np.zeros(len(entries), np.bool_)
        self._is_compressed = np.zeros(len(entries), np.bool_)
        # Position in the map, in items, where row 0 of the whole set would be if it were in this
        # shard: row r of the set, in shard i, starts at _row_zero[i] + r * V.
        self._row_zero = np.zeros(len(entries), np.int64)
        self._shard_of_row = (
            np.repeat(np.arange(len(entries), dtype=np.int32), rows_per_shard)
            if self.first_row[-1] <= 1 << 24  # rows: 64 MB of shard numbers; beyond, a search
            else None
        )
        # A set of less than half the memory is read ahead completely, once; of a larger one only
        # the rows of the next batches.
        stored_bytes = (
            int(self.first_row[-1]) * self._values_per_row * NUMPY_DTYPES[spec.dtype].itemsize
        )
        self._stays_in_memory = (
            stored_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        )
        self._verified = VerifiedShards(path)
        self._lock = threading.RLock()
        self._map: MappedRows | None = None
        self._scales: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = None

    def touch(self, shard_index: int) -> ShardLayout:
        """Verify a shard, unless that was done before, and make its rows readable."""
        layout = self._layouts.get(shard_index)
        if layout is not None:
            return layout
        with self._lock:
            entry = self._entries[shard_index]
            shard_file = shard_path(self._path, entry.unit)
            layout = self._verified.verify(shard_file, self._spec, entry)
            if not layout.is_compressed:
                mapped_rows = self._mapped_rows()
                mapped_rows.map(shard_index, shard_file, layout.features_start, entry.rows)
                self._row_zero[shard_index] = (
                    mapped_rows.first_item[shard_index]
                    - self.first_row[shard_index] * self._values_per_row
                )
                if self._stays_in_memory and entry.rows:
                    mapped_rows.will_need(shard_index, 0, entry.rows)
            if self._spec.dtype == "uint8":
                scale, offset = self._scale_tables()
                scale[shard_index] = _read_items(shard_file, *layout.lists["scale"])
                offset[shard_index] = _read_items(shard_file, *layout.lists["offset"])
            self._is_compressed[shard_index] = layout.is_compressed
            # Last, because other threads look at these two without the lock.
            self._layouts[shard_index] = layout
            self._is_ready[shard_index] = True
            return layout

    def gather(
        self,
        row_positions: npt.NDArray[np.int64],
        output_dtype: np.dtype[Any],
        output_rows: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """Decode the rows at positions 0..N-1, (n, *shape), in that order.

        They are written into `output_rows`, or into a new array of `output_dtype`.
        """
        shard_of_row = self._shards_of(row_positions)
        output_shape = (len(row_positions), *self._spec.shape)
        if output_rows is None:
            output_rows = np.empty(output_shape, output_dtype)
        # Stored values that need no conversion are gathered into the output, without a copy
        # between.
        is_plain = (
            self._spec.dtype in ("float16", "float32") and output_rows.dtype == self._spec.dtype
        )
        if self._is_compressed.any() and self._is_compressed[shard_of_row].any():
            stored_rows = self._gather_compressed(row_positions, shard_of_row)
        else:
            direct_output = (
                output_rows.reshape(len(row_positions), self._values_per_row)
                if is_plain and output_rows.flags.c_contiguous
                else None
            )
            stored_rows = self._mapped_rows().gather(
                self._row_zero[shard_of_row] + row_positions * self._values_per_row, direct_output
            )
            if direct_output is not None:
                return output_rows
        self._decode_into(stored_rows.reshape(output_shape), shard_of_row, output_rows)
        return output_rows

    def read_range(self, start_row: int, stop_row: int, output_rows: npt.NDArray[Any]) -> None:
        """Decode consecutive rows into `output_rows` (stop_row - start_row, *shape)."""
        output_start = 0
        for shard_index, first, stop in self._shard_ranges(start_row, stop_row):
            if self.touch(shard_index).is_compressed:
                stored_rows = read_compressed_rows(
                    self._shard_path(shard_index), slice(first, stop)
                )
            else:
                stored_rows = self._mapped_rows().rows(shard_index, first, stop)
            output_stop = output_start + stop - first
            self._decode_into(
                stored_rows.reshape(stop - first, *self._spec.shape),
                shard_index,
                output_rows[output_start:output_stop],
            )
            output_start = output_stop

    def _shard_ranges(self, start_row: int, stop_row: int) -> Iterator[tuple[int, int, int]]:
        """Yield (shard index, first row, stop row within the shard) of consecutive rows."""
        first_shard = int(np.searchsorted(self.first_row, start_row, side="right")) - 1
        for shard_index in range(first_shard, len(self._entries)):
            shard_start, shard_stop = self.first_row[shard_index : shard_index + 2].tolist()
            if shard_start >= stop_row:
                return
            if shard_start < shard_stop:
                yield (
                    shard_index,
                    max(start_row, shard_start) - shard_start,
                    min(stop_row, shard_stop) - shard_start,
                )

    def is_compressed(self, row_positions: npt.NDArray[np.int64]) -> bool:
        """Return True if reading these rows decompresses something."""
        return bool(self._is_compressed[self._shards_of(row_positions)].any())

    def prefetch(self, row_positions: npt.NDArray[np.int64]) -> None:
        """Tell the operating system that these rows are read next.

        Does nothing for compressed rows, nor for a set that stays in memory.
        """
        if not len(row_positions) or self.is_compressed(row_positions) or self._stays_in_memory:
            return
        sorted_rows = np.sort(row_positions)
        # One call per run of neighbouring rows in a shard; reading a gap of up to 64 rows is
        # cheaper than another call.
        run_breaks = np.flatnonzero(np.diff(sorted_rows) > 64)
        run_starts = sorted_rows[np.r_[0, run_breaks + 1]]
        run_stops = sorted_rows[np.r_[run_breaks, len(sorted_rows) - 1]] + 1
        for run_start, run_stop in zip(run_starts.tolist(), run_stops.tolist(), strict=True):
            for shard_index, first, stop in self._shard_ranges(run_start, run_stop):
                self._mapped_rows().will_need(shard_index, first, stop)

    def read_texts(self, shard_index: int, list_name: str) -> npt.NDArray[np.bytes_]:
        """Return a text column of a shard as fixed-length bytes, (rows of the shard or failures,).

        list_name: "id", "content", "failed_id", "failed_content" or "failed_reason".
        """
        lists = self.touch(shard_index).lists
        return _read_items(self._shard_path(shard_index), *lists[list_name])

    def _shards_of(self, row_positions: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return the shard of each position, (n,), after making all of them readable."""
        if self._shard_of_row is not None:
            shard_of_row: npt.NDArray[Any] = self._shard_of_row[row_positions]
        else:
            shard_of_row = np.searchsorted(self.first_row, row_positions, side="right") - 1
        is_ready = self._is_ready[shard_of_row]
        if not is_ready.all():
            for shard_index in np.unique(shard_of_row[~is_ready]).tolist():
                self.touch(shard_index)
        return shard_of_row

    def _mapped_rows(self) -> MappedRows:
        with self._lock:
            if self._map is None:
                rows_per_shard = [entry.rows for entry in self._entries]
                self._map = MappedRows(
                    rows_per_shard, self._values_per_row, NUMPY_DTYPES[self._spec.dtype]
                )
            return self._map

    def _scale_tables(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return scales and offsets of uint8, (S, C) each, filled when a shard is touched."""
        with self._lock:
            if self._scales is None:
                shape = (len(self._entries), self._spec.shape[0])
                self._scales = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
            return self._scales

    def _gather_compressed(
        self, row_positions: npt.NDArray[np.int64], shard_of_row: npt.NDArray[Any]
    ) -> npt.NDArray[Any]:
        """Return stored rows (n, V), of which some are compressed."""
        stored_rows = np.empty(
            (len(row_positions), self._values_per_row), NUMPY_DTYPES[self._spec.dtype]
        )
        for shard_index in np.unique(shard_of_row).tolist():
            output_index = np.flatnonzero(shard_of_row == shard_index)
            shard_rows = row_positions[output_index] - self.first_row[shard_index]
            if self.touch(shard_index).is_compressed:
                # HDF5 wants increasing positions without repetition.
                distinct_rows, inverse_index = np.unique(shard_rows, return_inverse=True)
                stored_rows[output_index] = read_compressed_rows(
                    self._shard_path(shard_index), distinct_rows
                ).reshape(-1, self._values_per_row)[inverse_index]
            else:
                stored_rows[output_index] = self._mapped_rows().gather(
                    self._row_zero[shard_index] + row_positions[output_index] * self._values_per_row
                )
        return stored_rows

    def _decode_into(
        self,
        stored_rows: npt.NDArray[Any],
        shard_of_row: int | npt.NDArray[Any],
        output_rows: npt.NDArray[Any],
    ) -> None:
        """Decode stored rows into `output_rows`.

        shard_of_row: one shard, or one per row, for the scales of uint8.
        """
        if self._spec.dtype == "uint8":
            scale, offset = self._scale_tables()
            output_rows[...] = decode_rows(
                stored_rows, "uint8", scale[shard_of_row], offset[shard_of_row]
            )
        elif (
            stored_rows.dtype == np.float16
            and output_rows.dtype == np.float32
            and output_rows.flags.c_contiguous
        ):
            float16_to_float32(stored_rows, output_rows)
        else:
            output_rows[...] = decode_rows(stored_rows, self._spec.dtype)

    def _shard_path(self, shard_index: int) -> Path:
        return shard_path(self._path, self._entries[shard_index].unit)


def _read_items(shard_file: Path, byte_offset: int, n_items: int, dtype: str) -> npt.NDArray[Any]:
    """Read `n_items` items at a byte offset of a file, (n_items,)."""
    # Not mapped: the file's pages would count as memory of this process.
    if not n_items:
        return np.empty(0, dtype)
    try:
        with open(shard_file, "rb") as file:
            data = os.pread(file.fileno(), n_items * np.dtype(dtype).itemsize, byte_offset)
    except FileNotFoundError as error:
        raise ShardMissing(f"{shard_file} was removed while it was being read") from error
    return np.frombuffer(data, dtype, n_items)
