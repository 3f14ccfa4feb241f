"""Batches in shuffled order that read the disk in long runs.

Rows are cut into blocks of neighbours; the blocks are shuffled; `buffer_rows` rows of blocks at a
time are shuffled among themselves. A batch thus mixes rows of many blocks, while the disk sees one
block after the other. Rows are not copied into a buffer: the operating system's page cache is the
buffer, told in advance which rows come next.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.cache.reader import ShardReader


class FeatureBatch(NamedTuple):
    """Some rows of a feature set."""

    rows: npt.NDArray[np.int64]  # (b,) positions in the feature set
    features: npt.NDArray[Any]  # (b, *shape), a copy, free to be changed


def iter_batches(
    reader: ShardReader,
    positions: npt.NDArray[np.int64],
    batch_size: int,
    seed: int | Sequence[int] | None,
    block_rows: int,
    buffer_rows: int,
    dtype: npt.DTypeLike,
) -> Iterator[FeatureBatch]:
    """Every position exactly once, in batches of `batch_size` rows, the last one smaller.

    seed None: in the order given. Otherwise the order depends on seed, positions, block_rows and
    buffer_rows alone. Raises ValueError at the call, not at the first batch.
    """
    if batch_size < 1 or block_rows < 1 or buffer_rows < block_rows:
        raise ValueError(
            f"batch_size {batch_size} and block_rows {block_rows} must be at least 1, and "
            f"buffer_rows {buffer_rows} at least block_rows"
        )
    buffers: Iterator[npt.NDArray[np.int64]]
    if seed is None:
        buffers = (
            positions[start : start + buffer_rows]
            for start in range(0, len(positions), buffer_rows)
        )
    else:
        buffers = shuffled_buffers(positions, seed, block_rows, buffer_rows)
    return _batches(reader, buffers, batch_size, np.dtype(dtype))


def shuffled_buffers(
    positions: npt.NDArray[np.int64], seed: int | Sequence[int], block_rows: int, buffer_rows: int
) -> Iterator[npt.NDArray[np.int64]]:
    """The positions as buffers, each a shuffle of some blocks; every position in exactly one."""
    generator = np.random.default_rng(seed)
    blocks = generator.permutation(-(-len(positions) // block_rows))
    per_buffer = buffer_rows // block_rows
    for first in range(0, len(blocks), per_buffer):
        starts = (blocks[first : first + per_buffer] * block_rows).tolist()
        yield generator.permutation(
            np.concatenate([positions[start : start + block_rows] for start in starts])
        )


def _batches(
    reader: ShardReader,
    buffers: Iterator[npt.NDArray[np.int64]],
    batch_size: int,
    dtype: np.dtype[Any],
) -> Iterator[FeatureBatch]:
    rest = next(buffers, np.empty(0, np.int64))
    reader.prefetch(rest)
    while len(rest):
        coming = next(buffers, np.empty(0, np.int64))
        reader.prefetch(coming)
        whole = len(rest) // batch_size * batch_size if len(coming) else len(rest)
        # Compressed rows are decompressed a buffer at a time, because each batch of it would touch
        # all the same chunks.
        held: npt.NDArray[Any] | None = None
        if reader.is_compressed(rest[:whole]):
            held = reader.gather(rest[:whole], dtype)
        for start in range(0, whole, batch_size):
            rows = rest[start : min(start + batch_size, whole)]
            # The copy frees the rest of the buffer of a batch that is kept.
            features = (
                reader.gather(rows, dtype)
                if held is None
                else held[start : start + len(rows)].copy()
            )
            yield FeatureBatch(rows, features)
        rest = np.concatenate([rest[whole:], coming])
