"""Reading a feature set: the rows of the shards that are published at the time of opening.

N rows in the set, n rows requested, *shape the shape of one row.
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headrace.cache.batches import FeatureBatch, iter_batches
from headrace.cache.count_text import count_text
from headrace.cache.errors import CacheError
from headrace.cache.format.encoding import QuantizationError
from headrace.cache.format.shard import FailedSample
from headrace.cache.manifest import ShardEntry, read_manifest
from headrace.cache.publish import FEATURES, is_feature_set, read_spec
from headrace.cache.reader import ShardReader
from headrace.cache.row_index import RowIndex, as_content_hashes
from headrace.cache.spec import FeatureSpec

if TYPE_CHECKING:
    import dask.array
    import torch
    import torch.utils.data

RowPositions = Sequence[int] | npt.NDArray[Any]
# Texts of 32 hex digits, or an array of them as text or bytes.
ContentHashes = Sequence[str] | npt.NDArray[Any]


def open_feature_set(directory: Path | str) -> "FeatureSet":
    """Open the shards that are published at this moment.

    Only the spec and the manifest are read; shards are verified when first touched, or all at once
    by `FeatureSet.verify_shards`. Raises FeatureSetMissing, ManifestCorrupt, SpecMismatch.
    """
    directory = Path(directory)
    spec = read_spec(directory)
    shard_entries = read_manifest(directory)
    # By unit name, not in the order of publication, so that an interrupted extraction gives the
    # same rows in the same order as an uninterrupted one.
    return FeatureSet(directory, spec, tuple(shard_entries[unit] for unit in sorted(shard_entries)))


def list_feature_sets(cache_root: Path | str) -> list["FeatureSet"]:
    """Open every feature set of a cache, ordered by fingerprint; [] where there is no cache."""
    return [open_feature_set(path) for path in feature_set_directories(cache_root)]


def feature_set_directories(cache_root: Path | str) -> list[Path]:
    """Return the directories of the feature sets of a cache, readable or broken."""
    return sorted(path for path in (Path(cache_root) / FEATURES).glob("*") if is_feature_set(path))


def unfinished_directories(cache_root: Path | str) -> list[Path]:
    """Return the directories that killed writers left without a spec; no reader sees them."""
    return sorted(
        path
        for path in (Path(cache_root) / FEATURES).glob("[!.]*")
        if path.is_dir() and not is_feature_set(path)
    )


class FeatureSet:
    """N rows of one spec, addressed by position or by content hash.

    A position is valid within one opened feature set only; content hashes are stable. Safe to use
    from several threads, after a fork, and when pickled to another process (which opens the same
    shards again).

    Every method that reads rows raises ShardMissing, ShardCorrupt or ShardUnreadable when it
    touches a shard that is not as it was published, or cannot be read.
    """

    def __init__(self, path: Path, spec: FeatureSpec, entries: tuple[ShardEntry, ...]) -> None:
        self.path, self.spec, self.entries = path, spec, entries
        self._reader = ShardReader(path, spec, entries)
        self._index: RowIndex | None = None
        self._lock = threading.Lock()

    # Maps, locks and the index stay here: a Dask task carries three small values, and the worker
    # opens the shards again.
    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureSet, (self.path, self.spec, self.entries)

    def __repr__(self) -> str:
        return (
            f"<FeatureSet {self.spec.name} of {self.spec.backbone}: {self.shape} {self.spec.dtype} "
            f"in {self.path}>"
        )

    @property
    def n_rows(self) -> int:
        """Number of rows, N."""
        return int(self._reader.first_row[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *spec.shape), like that of an array."""
        return (self.n_rows, *self.spec.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of decoded rows by default: float16 if stored so, float32 otherwise."""
        return np.dtype(np.float16 if self.spec.dtype == "float16" else np.float32)

    @property
    def stored_bytes(self) -> int:
        """Size of the shards on disk, in bytes."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def quantization_error(self) -> QuantizationError:
        """Error of the storage dtype, measured when the rows were written."""
        return sum((entry.quantization_error for entry in self.entries), QuantizationError())

    def __len__(self) -> int:
        return self.n_rows

    def ids(self) -> list[str]:
        """Return the N sample ids that the images had when they were extracted."""
        return [
            text for shard in range(len(self.entries)) for text in self._shard_texts(shard, "id")
        ]

    def content_hashes(self) -> npt.NDArray[np.bytes_]:
        """Return the content hashes of the rows, (N,) S32."""
        parts = [self._reader.read_texts(shard, "content") for shard in range(len(self.entries))]
        return np.concatenate([*parts, np.empty(0, "S32")])

    def failures(self) -> list[FailedSample]:
        """Return the samples without a row, with the reason."""
        failed_samples: list[FailedSample] = []
        for shard_index, entry in enumerate(self.entries):
            if entry.failed:
                names = ("failed_id", "failed_content", "failed_reason")
                columns = [self._shard_texts(shard_index, name) for name in names]
                failed_samples += map(FailedSample, *columns)
        return failed_samples

    def cached_hashes(self) -> frozenset[str]:
        """Return hashes with a row or a recorded failure: these are not extracted again."""
        return frozenset(self.content_hashes().astype("U32").tolist()) | {
            failure.content_hash for failure in self.failures()
        }

    def locate(self, content_hashes: ContentHashes) -> npt.NDArray[np.int64]:
        """Return the (n,) int64 row positions of n content hashes, -1 where there is no row."""
        # Sorted once, on first use: most readers address rows by position and never need it.
        with self._lock:
            if self._index is None:
                self._index = RowIndex(self.content_hashes())
        return self._index.locate(as_content_hashes(content_hashes))

    def load(
        self, content_hashes: ContentHashes, dtype: npt.DTypeLike | None = np.float32
    ) -> npt.NDArray[Any]:
        """Return the rows of n content hashes, (n, *shape), in that order.

        Raises CacheError naming the first hashes that have no row.
        """
        rows = self.locate(content_hashes)
        if (is_missing := rows < 0).any():
            missing_hashes = as_content_hashes(content_hashes)[is_missing].astype("U32").tolist()
            raise CacheError(self._missing_rows_message(missing_hashes))
        return self.read(rows, dtype)

    def read(
        self,
        rows: RowPositions | slice,
        dtype: npt.DTypeLike | None = np.float32,
        *,
        out: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """Return a copy of the rows at these positions, (n, *shape), in that order.

        dtype: of the result; None: `FeatureSet.dtype`.
        out: an array of that shape, of any dtype, to write into instead of a new one.

        Raises IndexError for positions outside -N..N-1, ValueError for an `out` of another shape.
        """
        row_dtype = self.dtype if dtype is None else np.dtype(dtype)
        selected = (
            range(*rows.indices(self.n_rows))
            if isinstance(rows, slice)
            else self._checked_positions(rows)
        )
        shape = (len(selected), *self.spec.shape)
        if out is not None and out.shape != shape:
            raise ValueError(f"`out` has shape {out.shape}, and the rows have {shape}")
        if not isinstance(selected, range) or selected.step != 1:
            return self._reader.gather(np.asarray(selected, np.int64), row_dtype, out)
        # Consecutive rows are copied once, from the map into the array.
        output_rows = np.empty(shape, row_dtype) if out is None else out
        self._reader.read_range(selected.start, selected.start + len(selected), output_rows)
        return output_rows

    def prefetch(self, rows: RowPositions) -> None:
        """Have the operating system read these rows from disk, without waiting for them.

        Does nothing for a set that stays in memory anyway, nor for compressed shards.
        """
        self._reader.prefetch(self._checked_positions(rows))

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        """Return rows by position, slice, list or boolean mask; a tuple indexes into rows."""
        key, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(key, int | np.integer):
            row = self.read([int(key)], None)[0]
            return np.asarray(row[tuple(rest)])
        if not isinstance(key, slice):
            key = np.asarray(key)
            if key.dtype == np.bool_:
                if key.shape != (self.n_rows,):
                    raise IndexError(
                        f"a mask of shape {key.shape} for {count_text(self.n_rows, 'row')}"
                    )
                key = np.flatnonzero(key)
        return np.asarray(self.read(key, None)[(slice(None), *rest)])

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("a feature set is on disk; an array of it is always a copy")
        return self.read(slice(None), dtype)

    def iter_batches(
        self,
        batch_size: int,
        *,
        seed: int | Sequence[int] | None = None,
        rows: npt.NDArray[np.int64] | None = None,
        dtype: npt.DTypeLike | None = np.float32,
        block_rows: int = 1024,
        buffer_rows: int = 16384,
    ) -> Iterator[FeatureBatch]:
        """Yield batches (rows (b,), features (b, *shape)) that cover `rows` (None: all) once.

        With seed None in the given order; otherwise shuffled: blocks of `block_rows` neighbouring
        rows, then the rows within buffers of `buffer_rows`. For another order in each epoch pass
        `seed=(7, epoch)`. Raises ValueError for sizes below 1.
        """
        row_positions = np.arange(self.n_rows) if rows is None else self._checked_positions(rows)
        return iter_batches(
            self._reader,
            row_positions,
            batch_size,
            seed,
            block_rows,
            buffer_rows,
            dtype or self.dtype,
        )

    def to_dask_array(self, dtype: npt.DTypeLike | None = None) -> "dask.array.Array":
        """Return a dask array (N, *shape) with a chunk per shard, which the workers read."""
        import dask.array
        from dask.delayed import delayed

        row_dtype = self.dtype if dtype is None else np.dtype(dtype)
        read_delayed = delayed(read_shard_rows, pure=True)
        # Any, because these functions of dask.array have no annotations.
        dask_array: Any = dask.array
        shard_arrays = [
            dask_array.from_delayed(
                read_delayed(self.path, self.spec, entry, row_dtype),
                (entry.rows, *self.spec.shape),
                dtype=row_dtype,
            )
            for entry in self.entries
            if entry.rows
        ]
        array: dask.array.Array = (
            dask_array.concatenate(shard_arrays)
            if shard_arrays
            else dask_array.zeros(self.shape, dtype=row_dtype)
        )
        return array

    def to_torch_dataset(
        self, dtype: npt.DTypeLike | None = np.float32
    ) -> "torch.utils.data.Dataset[tuple[torch.Tensor, int]]":
        """Return a torch Dataset of (feature (*shape), row position) that reads by batches."""
        from headrace.cache.torch_dataset import FeatureDataset

        return FeatureDataset(
            self.read, self.n_rows, self.dtype if dtype is None else np.dtype(dtype)
        )

    def verify_shards(self) -> None:
        """Verify every shard now, before training, instead of when it is first touched."""
        for shard_index in range(len(self.entries)):
            self._reader.touch(shard_index)

    def _checked_positions(self, rows: RowPositions) -> npt.NDArray[np.int64]:
        positions = np.asarray(rows)
        # An empty list becomes an array of floats.
        if positions.ndim != 1 or (positions.size and positions.dtype.kind not in "iu"):
            raise IndexError(
                f"row positions are {positions.dtype} of shape {positions.shape}; expected n "
                "integers"
            )
        positions = positions.astype(np.int64, copy=False)
        lowest, highest = int(positions.min(initial=0)), int(positions.max(initial=-1))
        if lowest < -self.n_rows or highest >= self.n_rows:
            raise IndexError(
                f"rows {positions.min()} to {positions.max()} of a feature set of "
                f"{count_text(self.n_rows, 'row')}"
            )
        if lowest < 0:
            positions = np.where(positions < 0, positions + self.n_rows, positions)
        return positions

    def _shard_texts(self, shard_index: int, list_name: str) -> list[str]:
        return [text.decode() for text in self._reader.read_texts(shard_index, list_name).tolist()]

    def _missing_rows_message(self, missing_hashes: list[str]) -> str:
        failures = {
            failure.content_hash: f"{failure.id} ({failure.reason})" for failure in self.failures()
        }
        names = [failures.get(content_hash, content_hash) for content_hash in missing_hashes[:3]]
        more = f" and {len(missing_hashes) - 3} more" if len(missing_hashes) > 3 else ""
        return (
            f"{self.path}: {self.spec.name} of {self.spec.backbone} has no row for "
            f"{', '.join(names)}{more}. It holds {count_text(self.n_rows, 'row')} and "
            f"{count_text(len(failures), 'recorded failure')}. `headrace run RECIPE` extracts what "
            "is missing of the recipe's images; or leave these samples out"
        )


def read_shard_rows(
    path: Path, spec: FeatureSpec, entry: ShardEntry, dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """Return all rows of one shard, (entry.rows, *shape), a task of `FeatureSet.to_dask_array`."""
    return FeatureSet(path, spec, (entry,)).read(slice(None), dtype)
