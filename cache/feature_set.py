"""Reading a feature set: the rows of the shards that are published when it is opened.

N rows, n rows asked for, *shape one row's shape, V values per row.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headrace.cache.batches import iter_batches
from headrace.cache.check import Verified
from headrace.cache.encoding import STORED, RoundOff, decode
from headrace.cache.errors import RowsMissing, ShardMissing
from headrace.cache.manifest import ShardEntry, read_manifest
from headrace.cache.mapping import MappedRows
from headrace.cache.publish import FEATURES, SPEC, read_spec, shard_path
from headrace.cache.rows import RowIndex, as_hashes
from headrace.cache.shard import Failure
from headrace.cache.spec import FeatureSpec
from headrace.cache.structure import Layout

if TYPE_CHECKING:
    import dask.array
    import torch.utils.data

    from headrace.cache.batches import Batch


def open_feature_set(directory: Path | str) -> "FeatureSet":
    """Open what is published at this moment. Reads the spec and the manifest only; shards are checked when first touched.

    Raises FeatureSetMissing, ManifestCorrupt, SpecMismatch.
    """
    directory = Path(directory)
    spec = read_spec(directory)
    entries = read_manifest(directory)
    # By unit name, not in the order of publication: an interrupted extraction and an uninterrupted one read alike.
    return FeatureSet(directory, spec, tuple(entries[unit] for unit in sorted(entries)))


def list_feature_sets(cache_root: Path | str) -> list["FeatureSet"]:
    """Every feature set of a cache, by fingerprint; an empty list where there is no cache."""
    parent = Path(cache_root) / FEATURES
    return [open_feature_set(path.parent) for path in sorted(parent.glob(f"*/{SPEC}"))]


class FeatureSet:
    """N rows of one spec, addressed by position or by content hash.

    A position means something in one opened feature set only; content hashes are for keeping. Safe to use from several
    threads, after a fork, and by pickling to another process (which opens the same shards again).
    """

    def __init__(self, path: Path, spec: FeatureSpec, entries: tuple[ShardEntry, ...]) -> None:
        self.path, self.spec, self.entries = path, spec, entries
        #: (len(entries) + 1,) int64: shard i holds the rows first_row[i] to first_row[i + 1].
        self.first_row = np.concatenate([[0], np.cumsum([entry.rows for entry in entries], dtype=np.int64)]).astype(
            np.int64
        )
        self._values = int(np.prod(spec.shape, dtype=np.int64))
        self._layouts: dict[int, Layout] = {}
        self._scales: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = None
        self._verified = Verified(path)
        self._lock = threading.RLock()
        self._mapped: MappedRows | None = None
        self._index: RowIndex | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureSet, (self.path, self.spec, self.entries)

    def __repr__(self) -> str:
        return f"<FeatureSet {self.spec.name} of {self.spec.backbone}: {self.shape} {self.spec.dtype} in {self.path}>"

    @property
    def n_rows(self) -> int:
        """N."""
        return int(self.first_row[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *spec.shape), as of an array."""
        return (self.n_rows, *self.spec.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """What rows are decoded to before any other dtype is asked for: float16, else float32."""
        return np.dtype(np.float16 if self.spec.dtype == "float16" else np.float32)

    @property
    def stored_bytes(self) -> int:
        """Size of the shards on disk."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def round_off(self) -> RoundOff:
        """What storing has cost, measured when the rows were written."""
        return sum((entry.round_off for entry in self.entries), RoundOff())

    def __len__(self) -> int:
        return self.n_rows

    def ids(self) -> list[str]:
        """N sample ids, as they were when the rows were extracted."""
        return [text for shard in range(len(self.entries)) for text in self._texts(shard, "id")]

    def content(self) -> npt.NDArray[np.bytes_]:
        """(N,) S32 content hashes."""
        parts = [self._bytes(shard, "content") for shard in range(len(self.entries))]
        return np.concatenate([*parts, np.empty(0, "S32")])

    def failures(self) -> list[Failure]:
        """The samples that have no row, with the reason."""
        found = []
        for shard, entry in enumerate(self.entries):
            if entry.failed:
                ids, reasons = self._texts(shard, "failed_id"), self._texts(shard, "failed_reason")
                content = [value.decode() for value in self._bytes(shard, "failed_content")]
                found += [Failure(*fields) for fields in zip(ids, content, reasons, strict=True)]
        return found

    def known(self) -> frozenset[str]:
        """Content hashes that have a row or a recorded failure: what need not be extracted again."""
        return frozenset(self.content().astype("U32").tolist()) | {failure.content for failure in self.failures()}

    def locate(self, content: Sequence[str] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """(n,) int64 row positions of content hashes (text, bytes, or an array of either); -1 where there is no row."""
        with self._lock:
            if self._index is None:
                self._index = RowIndex(self.content())
        return self._index.locate(as_hashes(content))

    def load(self, content: Sequence[str] | npt.NDArray[Any], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """(n, *shape) rows of content hashes, in that order. Raises RowsMissing, naming the first that are not there."""
        rows = self.locate(content)
        if (rows < 0).any():
            raise RowsMissing(self._missing(as_hashes(content)[rows < 0]))
        return self.read(rows, dtype)

    def read(
        self, rows: Sequence[int] | npt.NDArray[Any] | slice, dtype: npt.DTypeLike = np.float32
    ) -> npt.NDArray[Any]:
        """(n, *shape) rows at these positions, in that order, as a copy; dtype None: as stored (float16), else float32.

        Raises IndexError outside -N..N-1; ShardMissing and ShardCorrupt when a shard is touched that is not as
        published.
        """
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.n_rows)
            if step == 1:
                return self._read_run(start, max(start, stop), dtype)
            rows = np.arange(start, stop, step)
        positions = self._positions(rows)
        shards = np.searchsorted(self.first_row, positions, side="right") - 1
        touched = np.unique(shards) if len(self.entries) > 1 else np.arange(min(1, len(positions)))
        for shard in touched:
            self._touch(int(shard))
        compressed = any(self._layouts[int(shard)].compressed for shard in touched)
        if compressed:
            stored = self._read_compressed(positions, shards, touched)
        else:
            mapped = self._mapping()
            stored = mapped.gather(mapped.first_item[shards] + (positions - self.first_row[shards]) * self._values)
        return self._decoded(stored.reshape(len(positions), *self.spec.shape), shards, dtype)

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        """Rows by position, slice, list or boolean mask, in `dtype`; a tuple indexes the rows further, as in an array."""
        rest: tuple[Any, ...] = ()
        if isinstance(key, tuple):
            key, rest = key[0], key[1:]
        if isinstance(key, int | np.integer):
            row = self.read([int(key)], None)[0]
            return np.asarray(row[rest] if rest else row)
        if not isinstance(key, slice):
            key = np.asarray(key)
            if key.dtype == np.bool_:
                if key.shape != (self.n_rows,):
                    raise IndexError(f"a mask of shape {key.shape} for {self.n_rows} rows")
                key = np.flatnonzero(key)
        values = self.read(key, None)
        return np.asarray(values[(slice(None), *rest)] if rest else values)

    def __array__(self, dtype: npt.DTypeLike = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("a feature set is on disk; an array of it is always a copy")
        return self.read(slice(None), dtype)

    def iter_batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        rows: npt.NDArray[np.int64] | None = None,
        dtype: npt.DTypeLike = np.float32,
        block_rows: int = 1024,
        buffer_rows: int = 16384,
    ) -> Iterator["Batch"]:
        """Batches (rows (b,), features (b, *shape)) that hold every row exactly once; see `batches.iter_batches`."""
        return iter_batches(
            self, batch_size, seed=seed, rows=rows, dtype=dtype, block_rows=block_rows, buffer_rows=buffer_rows
        )

    def to_dask_array(self, dtype: npt.DTypeLike = None) -> "dask.array.Array":
        """A dask array (N, *shape) with one chunk per shard; tasks carry a path and a unit, and read in the worker."""
        from headrace.cache.interop import to_dask_array

        return to_dask_array(self, dtype)

    def to_torch_dataset(self, dtype: npt.DTypeLike = np.float32) -> "torch.utils.data.Dataset[Any]":
        """A map-style torch Dataset of (feature tensor, row position), with `__getitems__` for whole batches at once."""
        from headrace.cache.interop import to_torch_dataset

        return to_torch_dataset(self, dtype)

    def check(self, shards: Sequence[int] | None = None) -> None:
        """Check these shards (all of them) now, before training, instead of when they are first touched."""
        for shard in range(len(self.entries)) if shards is None else shards:
            self._touch(shard)

    def prefetch(self, rows: npt.NDArray[np.int64]) -> bool:
        """Tell the operating system that these rows are read next; returns whether some of them are compressed instead."""
        shards = np.searchsorted(self.first_row, rows, side="right") - 1
        compressed = False
        for shard in np.unique(shards).tolist():
            layout = self._touch(shard)
            compressed |= layout.compressed
            if not layout.compressed:
                local = np.sort(rows[shards == shard]) - self.first_row[shard]
                # One call per run of neighbours; a hole of a few rows is cheaper to read than to leave out.
                cuts = np.flatnonzero(np.diff(local) > 64)
                starts, stops = local[np.r_[0, cuts + 1]], local[np.r_[cuts, len(local) - 1]] + 1
                for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                    self._mapping().will_need(shard, start, stop)
        return compressed

    # -- below: how rows get from shards into arrays

    def _touch(self, shard: int) -> Layout:
        layout = self._layouts.get(shard)
        if layout is not None:
            return layout
        with self._lock:
            entry = self.entries[shard]
            path = shard_path(self.path, entry.unit)
            layout = self._verified.check(path, self.spec, entry.unit, entry.xxh3)
            if not layout.compressed:
                self._mapping().map(shard, path, layout.features, entry.rows)
            if self.spec.dtype == "uint8":
                scale, offset = self._scale_tables()
                count = self.spec.shape[0]
                scale[shard] = _pread(path, layout.scale, count, np.dtype("<f4"))
                offset[shard] = _pread(path, layout.offset, count, np.dtype("<f4"))
            self._layouts[shard] = layout
            return layout

    def _mapping(self) -> MappedRows:
        with self._lock:
            if self._mapped is None:
                self._mapped = MappedRows([entry.rows for entry in self.entries], self._values, STORED[self.spec.dtype])
            return self._mapped

    def _scale_tables(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        with self._lock:
            if self._scales is None:
                shape = (len(self.entries), self.spec.shape[0])
                self._scales = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
            return self._scales

    def _positions(self, rows: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        positions = np.asarray(rows)
        if positions.ndim != 1 or (positions.size and not np.issubdtype(positions.dtype, np.integer)):
            raise IndexError(f"row positions are {positions.dtype} of shape {positions.shape}; expected n integers")
        positions = positions.astype(np.int64)
        if positions.size and (positions.min() < -self.n_rows or positions.max() >= self.n_rows):
            raise IndexError(f"rows {positions.min()} to {positions.max()} of a feature set of {self.n_rows} rows")
        return np.where(positions < 0, positions + self.n_rows, positions)

    def _read_run(self, start: int, stop: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Consecutive rows, shard by shard, each copied or converted once."""
        out = np.empty((stop - start, *self.spec.shape), self.dtype if dtype is None else dtype)
        first = int(np.searchsorted(self.first_row, start, side="right")) - 1
        for shard in range(first, len(self.entries)):
            begin, end = max(start, int(self.first_row[shard])), min(stop, int(self.first_row[shard + 1]))
            if begin >= stop:
                break
            if begin < end:
                layout, local = self._touch(shard), begin - int(self.first_row[shard])
                if layout.compressed:
                    stored = self._decompress(shard, slice(local, local + end - begin))
                else:
                    stored = self._mapping().rows(shard, local, local + end - begin)
                stored = stored.reshape(end - begin, *self.spec.shape)
                out[begin - start : end - start] = self._decoded(stored, shard, None)
        return out

    def _read_compressed(
        self, positions: npt.NDArray[np.int64], shards: npt.NDArray[np.int64], touched: npt.NDArray[np.int64]
    ) -> npt.NDArray[Any]:
        stored = np.empty((len(positions), self._values), STORED[self.spec.dtype])
        for shard in touched.tolist():
            here = np.flatnonzero(shards == shard)
            local = positions[here] - self.first_row[shard]
            if self._layouts[shard].compressed:
                # HDF5 wants increasing positions without repetition.
                unique, back = np.unique(local, return_inverse=True)
                stored[here] = self._decompress(shard, unique)[back]
            else:
                mapped = self._mapping()
                stored[here] = mapped.gather(mapped.first_item[shard] + local * self._values)
        return stored

    def _decompress(self, shard: int, rows: Any) -> npt.NDArray[Any]:
        from headrace.cache.compression import read_compressed

        return read_compressed(shard_path(self.path, self.entries[shard].unit), rows).reshape(-1, self._values)

    def _decoded(self, stored: npt.NDArray[Any], shards: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        if self.spec.dtype == "uint8":
            scale, offset = self._scale_tables()
            values = decode(stored, "uint8", scale[shards], offset[shards])
        else:
            values = decode(stored, self.spec.dtype)
        return values if dtype is None else values.astype(dtype, copy=False)

    def _bytes(self, shard: int, name: str) -> npt.NDArray[np.bytes_]:
        layout = self._touch(shard)
        count = layout.failed if name.startswith("failed_") else layout.rows
        width = 32 if name.endswith("content") else getattr(layout, f"{name}_bytes")
        path = shard_path(self.path, self.entries[shard].unit)
        return _pread(path, getattr(layout, name), count, np.dtype(f"S{width}"))

    def _texts(self, shard: int, name: str) -> list[str]:
        return [value.decode() for value in self._bytes(shard, name).tolist()]

    def _missing(self, content: npt.NDArray[np.bytes_]) -> str:
        failed = {failure.content: failure for failure in self.failures()}
        shown = []
        for value in content[:3].tolist():
            failure = failed.get(value.decode())
            shown.append(f"{failure.id} ({failure.reason})" if failure else value.decode())
        more = f" and {len(content) - 3} more" if len(content) > 3 else ""
        return (
            f"{self.path}: {self.spec.name} of {self.spec.backbone} has no row for {', '.join(shown)}{more}. "
            f"It holds {self.n_rows} rows and {len(failed)} recorded failures. "
            "Extract what is missing with `headrace extract`, or leave these samples out"
        )


def _pread(path: Path, offset: int, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """`count` items at a byte offset, as a copy: reading them through a mapping would keep the file's pages in memory."""
    if not count:
        return np.empty(0, dtype)
    try:
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), count * dtype.itemsize, offset)
    except FileNotFoundError as error:
        raise ShardMissing(f"{path} was removed while it was being read") from error
    return np.frombuffer(data, dtype, count)
