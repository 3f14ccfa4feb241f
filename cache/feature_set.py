"""Reading a feature set: the rows of the shards that are published when it is opened.

N rows, n rows asked for, *shape one row's shape.
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headrace.cache.batches import FeatureBatch, iter_batches
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

Indices = Sequence[int] | npt.NDArray[Any]
Contents = (
    Sequence[str] | npt.NDArray[Any]
)  # texts of 32 hex digits, or an array of them as text or bytes


def open_feature_set(directory: Path | str) -> "FeatureSet":
    """Open what is published at this moment.

    Reads the spec and the manifest only; shards are checked when first touched, or all at once by
    `FeatureSet.check`. Raises FeatureSetMissing, ManifestCorrupt, SpecMismatch.
    """
    directory = Path(directory)
    spec = read_spec(directory)
    entries = read_manifest(directory)
    # By unit name, not in the order of publication: an interrupted extraction and an uninterrupted
    # one read alike.
    return FeatureSet(directory, spec, tuple(entries[unit] for unit in sorted(entries)))


def list_feature_sets(cache_root: Path | str) -> list["FeatureSet"]:
    """Every feature set of a cache, by fingerprint; an empty list where there is no cache."""
    return [open_feature_set(path) for path in feature_set_directories(cache_root)]


def feature_set_directories(cache_root: Path | str) -> list[Path]:
    """Where the feature sets of a cache are, readable or broken."""
    return sorted(path for path in (Path(cache_root) / FEATURES).glob("*") if is_feature_set(path))


def unfinished_directories(cache_root: Path | str) -> list[Path]:
    """Directories that writers of earlier versions began and were killed in: nothing is in them,
    and no reader sees them.
    """
    found = (path for path in (Path(cache_root) / FEATURES).glob("*") if path.is_dir())
    return sorted(
        path for path in found if not path.name.startswith(".") and not is_feature_set(path)
    )


class FeatureSet:
    """N rows of one spec, addressed by position or by content hash.

    A position means something in one opened feature set only; content hashes are for keeping. Safe
    to use from several threads, after a fork, and by pickling to another process (which opens the
    same shards again).

    Whatever reads rows raises ShardMissing or ShardCorrupt when it touches a shard that is not as
    it was published.
    """

    def __init__(self, path: Path, spec: FeatureSpec, entries: tuple[ShardEntry, ...]) -> None:
        self.path, self.spec, self.entries = path, spec, entries
        self._reader = ShardReader(path, spec, entries)
        self._index: RowIndex | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureSet, (self.path, self.spec, self.entries)

    def __repr__(self) -> str:
        return (
            f"<FeatureSet {self.spec.name} of {self.spec.backbone}: {self.shape} {self.spec.dtype} "
            f"in {self.path}>"
        )

    @property
    def n_rows(self) -> int:
        """N."""
        return int(self._reader.first_row[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *spec.shape), as of an array."""
        return (self.n_rows, *self.spec.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """What rows are decoded to where no other dtype is asked for: float16 if stored so, else
        float32.
        """
        return np.dtype(np.float16 if self.spec.dtype == "float16" else np.float32)

    @property
    def stored_bytes(self) -> int:
        """Size of the shards on disk."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def quantization_error(self) -> QuantizationError:
        """What storing has cost, measured when the rows were written."""
        return sum((entry.quantization_error for entry in self.entries), QuantizationError())

    def __len__(self) -> int:
        return self.n_rows

    def ids(self) -> list[str]:
        """N sample ids, as they were when the rows were extracted."""
        return [text for shard in range(len(self.entries)) for text in self._texts(shard, "id")]

    def content_hashes(self) -> npt.NDArray[np.bytes_]:
        """(N,) S32 content hashes."""
        parts = [self._reader.text(shard, "content") for shard in range(len(self.entries))]
        return np.concatenate([*parts, np.empty(0, "S32")])

    def failures(self) -> list[FailedSample]:
        """The samples that have no row, with the reason."""
        found = []
        for shard, entry in enumerate(self.entries):
            if entry.failed:
                columns = [
                    self._texts(shard, f"failed_{name}") for name in ("id", "content", "reason")
                ]
                found += [FailedSample(*fields) for fields in zip(*columns, strict=True)]
        return found

    def known(self) -> frozenset[str]:
        """Content hashes that have a row or a recorded failure: what need not be
        extracted again.
        """
        return frozenset(self.content_hashes().astype("U32").tolist()) | {
            failure.content_hash for failure in self.failures()
        }

    def locate(self, content: Contents) -> npt.NDArray[np.int64]:
        """(n,) row positions of n content hashes; -1 where there is no row."""
        with self._lock:
            if self._index is None:
                self._index = RowIndex(self.content_hashes())
        return self._index.locate(as_content_hashes(content))

    def load(self, content: Contents, dtype: npt.DTypeLike | None = np.float32) -> npt.NDArray[Any]:
        """(n, *shape) rows of n content hashes, in that order.

        Raises CacheError, naming the first that have none.
        """
        rows = self.locate(content)
        if (rows < 0).any():
            raise CacheError(self._missing(as_content_hashes(content)[rows < 0].tolist()))
        return self.read(rows, dtype)

    def read(
        self,
        rows: Indices | slice,
        dtype: npt.DTypeLike | None = np.float32,
        *,
        out: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """(n, *shape) rows at these positions, in that order, as a copy; dtype None:
        `FeatureSet.dtype`.

        out: an array of that shape to write into, of any dtype, instead of a new one. Raises
        IndexError outside
        -N..N-1.
        """
        wanted = self.dtype if dtype is None else np.dtype(dtype)
        start, stop, step = rows.indices(self.n_rows) if isinstance(rows, slice) else (0, 0, 0)
        if isinstance(rows, slice) and step == 1:
            stop = max(start, stop)
            into = np.empty((stop - start, *self.spec.shape), wanted) if out is None else out
            _check_out(into, stop - start, self.spec.shape)
            self._reader.run(start, stop, into)
            return into
        positions = (
            np.arange(start, stop, step) if isinstance(rows, slice) else self._positions(rows)
        )
        if out is not None:
            _check_out(out, len(positions), self.spec.shape)
        return self._reader.gather(positions, wanted, out)

    def prefetch(self, rows: Indices) -> None:
        """Have the operating system read rows at these positions from the disk, without waiting for
        them.

        Nothing happens for a set that stays in memory anyway, nor for compressed shards.
        """
        self._reader.prefetch(self._positions(rows))

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        """Rows by position, slice, list or boolean mask, in `dtype`; a tuple goes on
        into the rows.
        """
        key, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(key, int | np.integer):
            row = self.read([int(key)], None)[0]
            return np.asarray(row[tuple(rest)])
        if not isinstance(key, slice):
            key = np.asarray(key)
            if key.dtype == np.bool_:
                if key.shape != (self.n_rows,):
                    raise IndexError(f"a mask of shape {key.shape} for {self.n_rows} rows")
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
        """Batches (rows (b,), features (b, *shape)) that hold each of `rows` (None: all) exactly
        once.

        seed None: in the given order. Otherwise shuffled by blocks and within a buffer; an epoch:
        `seed=(7, epoch)`.
        """
        positions = np.arange(self.n_rows) if rows is None else self._positions(rows)
        return iter_batches(
            self._reader, positions, batch_size, seed, block_rows, buffer_rows, dtype or self.dtype
        )

    def to_dask_array(self, dtype: npt.DTypeLike | None = None) -> "dask.array.Array":
        """A dask array (N, *shape) with one chunk per shard; a task carries a path and an entry."""
        import dask.array
        from dask.delayed import delayed

        wanted = self.dtype if dtype is None else np.dtype(dtype)
        read = delayed(read_shard_rows, pure=True)
        arrays: Any = dask.array  # has annotations, but not on these functions
        chunks = [
            arrays.from_delayed(
                read(self.path, self.spec, entry, wanted),
                (entry.rows, *self.spec.shape),
                dtype=wanted,
            )
            for entry in self.entries
            if entry.rows
        ]
        array: dask.array.Array = (
            arrays.concatenate(chunks) if chunks else arrays.zeros(self.shape, dtype=wanted)
        )
        return array

    def to_torch_dataset(
        self, dtype: npt.DTypeLike | None = np.float32
    ) -> "torch.utils.data.Dataset[tuple[torch.Tensor, int]]":
        """A torch Dataset of (feature (*shape), row position); a DataLoader reads a whole batch at
        once.
        """
        from headrace.cache.torch_dataset import FeatureDataset

        return FeatureDataset(
            self.read, self.n_rows, self.dtype if dtype is None else np.dtype(dtype)
        )

    def check(self) -> None:
        """Check every shard now, before training, instead of when it is first touched."""
        for shard in range(len(self.entries)):
            self._reader.touch(shard)

    def _positions(self, rows: Indices) -> npt.NDArray[np.int64]:
        positions = np.asarray(rows)
        if positions.ndim != 1 or (
            positions.size and not np.issubdtype(positions.dtype, np.integer)
        ):
            raise IndexError(
                f"row positions are {positions.dtype} of shape {positions.shape}; expected n "
                "integers"
            )
        positions = positions.astype(np.int64, copy=False)
        low, high = (int(positions.min()), int(positions.max())) if positions.size else (0, -1)
        if low < -self.n_rows or high >= self.n_rows:
            raise IndexError(f"rows {low} to {high} of a feature set of {self.n_rows} rows")
        return (
            positions if low >= 0 else np.where(positions < 0, positions + self.n_rows, positions)
        )

    def _texts(self, shard: int, name: str) -> list[str]:
        return [value.decode() for value in self._reader.text(shard, name).tolist()]

    def _missing(self, content: list[bytes]) -> str:
        failed = {failure.content_hash: failure for failure in self.failures()}
        shown = []
        for value in content[:3]:
            failure = failed.get(value.decode())
            shown.append(f"{failure.id} ({failure.reason})" if failure else value.decode())
        more = f" and {len(content) - 3} more" if len(content) > 3 else ""
        return (
            f"{self.path}: {self.spec.name} of {self.spec.backbone} has no row for "
            f"{', '.join(shown)}{more}. It holds {self.n_rows} rows and {len(failed)} recorded "
            "failures. `headrace run RECIPE` extracts what is missing of the recipe's images; or "
            "leave these samples out"
        )


def _check_out(out: npt.NDArray[Any], rows: int, shape: tuple[int, ...]) -> None:
    if out.shape != (rows, *shape):
        raise ValueError(f"`out` has shape {out.shape}, and the rows have {(rows, *shape)}")


def read_shard_rows(
    path: Path, spec: FeatureSpec, entry: ShardEntry, dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """(entry.rows, *shape): all rows of one shard. What a task of
    `FeatureSet.to_dask_array` does.
    """
    return FeatureSet(path, spec, (entry,)).read(slice(None), dtype)
