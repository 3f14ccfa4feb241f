"""Batches in shuffled order, read from disk in long runs.

Neighbouring rows form blocks of `block_rows`. The blocks are shuffled and joined to buffers of
`buffer_rows` rows, and the rows of a buffer are shuffled among themselves. A batch thus mixes rows
of many blocks, while the disk reads one block after the other. No rows are copied into a buffer:
the operating system's page cache is the buffer, told in advance which rows come next.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.cache.reader import ShardReader


class FeatureBatch(NamedTuple):
    """One batch of rows of a feature set."""

    rows: npt.NDArray[np.int64]  # (b,) positions in the feature set
    features: npt.NDArray[Any]  # (b, *shape), a copy that may be changed


def iter_batches(
    reader: ShardReader,
    row_positions: npt.NDArray[np.int64],
    batch_size: int,
    seed: int | Sequence[int] | None,
    block_rows: int,
    buffer_rows: int,
    dtype: npt.DTypeLike,
) -> Iterator[FeatureBatch]:
    """Yield every position exactly once, in batches of `batch_size` rows, the last one smaller.

    With seed None the order is the given one; otherwise it depends on seed, row_positions,
    block_rows and buffer_rows alone. Raises ValueError at the call, not at the first batch.
    """
    if batch_size < 1 or block_rows < 1 or buffer_rows < block_rows:
        raise ValueError(
            f"batch_size {batch_size} and block_rows {block_rows} must be at least 1, and "
            f"buffer_rows {buffer_rows} at least block_rows"
        )
    row_buffers: Iterator[npt.NDArray[np.int64]]
    if seed is None:
        row_buffers = (
            row_positions[start : start + buffer_rows]
            for start in range(0, len(row_positions), buffer_rows)
        )
    else:
        row_buffers = shuffled_buffers(row_positions, seed, block_rows, buffer_rows)
    return _batches(reader, row_buffers, batch_size, np.dtype(dtype))


def shuffled_buffers(
    row_positions: npt.NDArray[np.int64],
    seed: int | Sequence[int],
    block_rows: int,
    buffer_rows: int,
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield buffers of positions, each a shuffle of several blocks; every position once."""
    random_generator = np.random.default_rng(seed)
    block_order = random_generator.permutation(-(-len(row_positions) // block_rows))
    blocks_per_buffer = buffer_rows // block_rows
    for first_block in range(0, len(block_order), blocks_per_buffer):
        starts = block_order[first_block : first_block + blocks_per_buffer] * block_rows
        blocks = [row_positions[start : start + block_rows] for start in starts.tolist()]
        yield random_generator.permutation(np.concatenate(blocks))


def _batches(
    reader: ShardReader,
    row_buffers: Iterator[npt.NDArray[np.int64]],
    batch_size: int,
    dtype: np.dtype[Any],
) -> Iterator[FeatureBatch]:
    # One buffer ahead: the disk reads the next one while batches of this one are trained on.
    pending_rows = next(row_buffers, np.empty(0, np.int64))
    reader.prefetch(pending_rows)
    while len(pending_rows):
        next_buffer = next(row_buffers, np.empty(0, np.int64))
        reader.prefetch(next_buffer)
        # Whole batches; only after the last buffer a smaller one. The remaining rows go before
        # those of the next buffer.
        n_left = len(pending_rows) % batch_size if len(next_buffer) else 0
        n_ready = len(pending_rows) - n_left
        # Compressed rows are decompressed a buffer at a time: the rows of a batch lie in nearly all
        # chunks of the buffer, and each batch would decompress those again.
        buffer_features: npt.NDArray[Any] | None = None
        if reader.is_compressed(pending_rows[:n_ready]):
            buffer_features = reader.gather(pending_rows[:n_ready], dtype)
        for batch_start in range(0, n_ready, batch_size):
            batch_rows = pending_rows[batch_start : min(batch_start + batch_size, n_ready)]
            # A copy, because a view that the caller keeps would keep the whole buffer in memory.
            batch_features = (
                reader.gather(batch_rows, dtype)
                if buffer_features is None
                else buffer_features[batch_start : batch_start + len(batch_rows)].copy()
            )
            yield FeatureBatch(batch_rows, batch_features)
        pending_rows = np.concatenate([pending_rows[n_ready:], next_buffer])
