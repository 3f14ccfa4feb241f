"""How rows get from the shards of a feature set into arrays: checked when first touched, then
mapped.

N rows in S shards, n rows asked for, V values per row, *shape one row's shape.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.checksum import VerifiedShards
from headrace.cache.errors import ShardMissing
from headrace.cache.format.compression import read_compressed_rows
from headrace.cache.format.encoding import STORED_DTYPES, decode
from headrace.cache.format.float16 import float16_to_float32
from headrace.cache.format.validate import ShardLayout
from headrace.cache.manifest import ShardEntry
from headrace.cache.mapping import MappedRows
from headrace.cache.publish import shard_path
from headrace.cache.spec import FeatureSpec


class ShardReader:
    """The shards of one feature set.

    Every method checks the shards it needs: raises ShardMissing, ShardCorrupt.
    """

    def __init__(self, path: Path, spec: FeatureSpec, entries: Sequence[ShardEntry]) -> None:
        self._path, self._spec, self._entries = path, spec, entries
        counts = np.array([entry.rows for entry in entries], np.int64)
        #: (S + 1,): shard i holds the rows first_row[i] to first_row[i + 1].
        self.first_row = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._values = int(np.prod(spec.shape, dtype=np.int64))
        self._layouts: dict[int, ShardLayout] = {}
        # What a batch asks of all its shards at once, (S,) each.
        self._is_ready = np.zeros(len(entries), np.bool_)
        self._is_compressed = np.zeros(len(entries), np.bool_)
        self._row_zero = np.zeros(
            len(entries), np.int64
        )  # the item where row 0 of the set would be, were it in this shard
        self._shard_of_row = (
            np.repeat(np.arange(len(entries), dtype=np.int32), counts) if self._is_small() else None
        )
        # Of a set that stays in memory every row is read ahead once; of a larger one only what
        # comes next.
        stored_bytes = int(self.first_row[-1]) * self._values * STORED_DTYPES[spec.dtype].itemsize
        self._stays_in_memory = (
            stored_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        )
        self._verified = VerifiedShards(path)
        self._lock = threading.RLock()
        self._map: MappedRows | None = None
        self._scales: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = None

    def touch(self, shard: int) -> ShardLayout:
        """Check a shard, unless that was done, and make its rows readable."""
        layout = self._layouts.get(shard)
        if layout is not None:
            return layout
        with self._lock:
            entry = self._entries[shard]
            path = shard_path(self._path, entry.unit)
            layout = self._verified.check(path, self._spec, entry)
            if not layout.compressed:
                mapped = self._mapped()
                mapped.map(shard, path, layout.features, entry.rows)
                self._row_zero[shard] = (
                    mapped.first_item[shard] - self.first_row[shard] * self._values
                )
                if self._stays_in_memory and entry.rows:
                    mapped.will_need(shard, 0, entry.rows)
            if self._spec.dtype == "uint8":
                scale, offset = self._scale_tables()
                scale[shard] = _pread(path, layout.scale, self._spec.shape[0], np.dtype("<f4"))
                offset[shard] = _pread(path, layout.offset, self._spec.shape[0], np.dtype("<f4"))
            self._layouts[shard] = layout
            self._is_compressed[shard] = layout.compressed
            self._is_ready[shard] = True  # last: another thread may be looking
            return layout

    def gather(
        self,
        positions: npt.NDArray[np.int64],
        dtype: np.dtype[Any],
        out: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """(n, *shape) decoded rows at positions 0..N-1, in that order: a new array of `dtype`, or
        written into `out`.
        """
        shards = self._shards(positions)
        shape = (len(positions), *self._spec.shape)
        # float16 and float32 that stay what they are go straight to their place.
        is_plain = self._spec.dtype in ("float16", "float32") and self._spec.dtype == (
            dtype if out is None else out.dtype
        )
        if out is None:
            out = np.empty(shape, dtype)
        if self._is_compressed.any() and self._is_compressed[shards].any():
            stored = self._gather_compressed(positions, shards)
        else:
            into = (
                out.reshape(len(positions), self._values)
                if is_plain and out.flags.c_contiguous
                else None
            )
            stored = self._mapped().gather(self._row_zero[shards] + positions * self._values, into)
            if into is not None:
                return out
        self._decode(stored.reshape(shape), shards, out)
        return out

    def run(self, start: int, stop: int, out: npt.NDArray[Any]) -> None:
        """Write consecutive decoded rows into `out` (stop - start, *shape), shard by shard, each
        copied once.
        """
        shard = int(np.searchsorted(self.first_row, start, side="right")) - 1
        done = start
        while done < stop:
            first, end = int(self.first_row[shard]), min(stop, int(self.first_row[shard + 1]))
            if done < end:
                if self.touch(shard).compressed:
                    stored = read_compressed_rows(
                        self._shard_path(shard), slice(done - first, end - first)
                    )
                else:
                    stored = self._mapped().rows(shard, done - first, end - first)
                self._decode(
                    stored.reshape(end - done, *self._spec.shape),
                    shard,
                    out[done - start : end - start],
                )
                done = end
            shard += 1

    def is_compressed(self, positions: npt.NDArray[np.int64]) -> bool:
        """Whether reading these rows decompresses something."""
        return bool(self._is_compressed[self._shards(positions)].any())

    def prefetch(self, positions: npt.NDArray[np.int64]) -> None:
        """Tell the operating system that these rows come next."""
        if not len(positions) or self.is_compressed(positions) or self._stays_in_memory:
            return
        ordered = np.sort(positions)
        # One call per run of neighbours in a shard; a hole of a few rows is cheaper to read than to
        # leave out.
        cuts = np.flatnonzero(np.diff(ordered) > 64)
        starts, stops = ordered[np.r_[0, cuts + 1]], ordered[np.r_[cuts, len(ordered) - 1]] + 1
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            shard = int(np.searchsorted(self.first_row, start, side="right")) - 1
            while start < stop:
                first, end = int(self.first_row[shard]), min(stop, int(self.first_row[shard + 1]))
                if start < end:
                    self._mapped().will_need(shard, start - first, end - first)
                    start = end
                shard += 1

    def text(self, shard: int, name: str) -> npt.NDArray[np.bytes_]:
        """The list `name` of a shard ("id", "content", "failed_id", ...) as fixed-length bytes."""
        layout = self.touch(shard)
        count = layout.failed if name.startswith("failed_") else layout.rows
        width = 32 if name.endswith("content") else getattr(layout, f"{name}_bytes")
        return _pread(self._shard_path(shard), getattr(layout, name), count, np.dtype(f"S{width}"))

    def _is_small(self) -> bool:
        return bool(self.first_row[-1] <= 1 << 24)  # 64 MB of shard numbers

    def _shards(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """(n,) the shard of each position, all of them checked and readable."""
        if self._shard_of_row is not None:
            shards: npt.NDArray[Any] = self._shard_of_row[positions]
        else:
            shards = np.searchsorted(self.first_row, positions, side="right") - 1
        ready = self._is_ready[shards]
        if not ready.all():
            for shard in np.unique(shards[~ready]).tolist():
                self.touch(shard)
        return shards

    def _mapped(self) -> MappedRows:
        with self._lock:
            if self._map is None:
                rows = [entry.rows for entry in self._entries]
                self._map = MappedRows(rows, self._values, STORED_DTYPES[self._spec.dtype])
            return self._map

    def _scale_tables(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        with self._lock:
            if self._scales is None:
                shape = (len(self._entries), self._spec.shape[0])
                self._scales = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
            return self._scales

    def _gather_compressed(
        self, positions: npt.NDArray[np.int64], shards: npt.NDArray[Any]
    ) -> npt.NDArray[Any]:
        """(n, V) stored rows, some of which are compressed."""
        stored = np.empty((len(positions), self._values), STORED_DTYPES[self._spec.dtype])
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            local = positions[here] - self.first_row[shard]
            if self.touch(shard).compressed:
                # HDF5 wants increasing positions without repetition.
                unique, back = np.unique(local, return_inverse=True)
                stored[here] = read_compressed_rows(self._shard_path(shard), unique).reshape(
                    -1, self._values
                )[back]
            else:
                stored[here] = self._mapped().gather(
                    self._row_zero[shard] + positions[here] * self._values
                )
        return stored

    def _decode(self, stored: npt.NDArray[Any], shards: Any, out: npt.NDArray[Any]) -> None:
        """shards: one number, or one per row, for the scales of uint8."""
        if self._spec.dtype == "uint8":
            scale, offset = self._scale_tables()
            out[...] = decode(stored, "uint8", scale[shards], offset[shards])
        elif stored.dtype == np.float16 and out.dtype == np.float32 and out.flags.c_contiguous:
            float16_to_float32(stored, out)
        else:
            out[...] = decode(stored, self._spec.dtype)

    def _shard_path(self, shard: int) -> Path:
        return shard_path(self._path, self._entries[shard].unit)


def _pread(path: Path, offset: int, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """`count` items at a byte offset, as a copy: a mapping would count the file's pages as this
    process's memory.
    """
    if not count:
        return np.empty(0, dtype)
    try:
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), count * dtype.itemsize, offset)
    except FileNotFoundError as error:
        raise ShardMissing(f"{path} was removed while it was being read") from error
    return np.frombuffer(data, dtype, count)
