"""Batches in shuffled order that read the disk in long runs.

Rows are cut into blocks of neighbours; the blocks are shuffled; `buffer_rows` rows of blocks at a time are shuffled
among themselves. A batch thus mixes rows of many blocks, while the disk sees one block after the other. Rows are not
copied into a buffer: the operating system's page cache is the buffer, told in advance which blocks come next.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from headrace.cache.feature_set import FeatureSet


class Batch(NamedTuple):
    """Some rows of a feature set."""

    rows: npt.NDArray[np.int64]  # (b,) positions in the feature set
    features: npt.NDArray[Any]  # (b, *shape)


def iter_batches(
    features: "FeatureSet",
    batch_size: int,
    *,
    seed: int | Sequence[int] | None,
    rows: npt.NDArray[np.int64] | None,
    dtype: npt.DTypeLike,
    block_rows: int,
    buffer_rows: int,
) -> Iterator[Batch]:
    """Every one of `rows` (None: all) exactly once, in batches of `batch_size` rows, the last one smaller.

    seed None: in the order given. Otherwise the order depends on seed (an epoch: `seed=(7, epoch)`), rows, block_rows
    and buffer_rows alone. Features are copies, free to be changed.
    """
    if batch_size < 1 or block_rows < 1 or buffer_rows < block_rows:
        raise ValueError(
            f"batch_size {batch_size} and block_rows {block_rows} must be at least 1, "
            f"and buffer_rows {buffer_rows} at least block_rows"
        )
    positions = np.arange(features.n_rows) if rows is None else np.asarray(rows, np.int64)
    if seed is None:
        buffers = (positions[start : start + buffer_rows] for start in range(0, len(positions), buffer_rows))
    else:
        buffers = shuffled_buffers(positions, seed, block_rows, buffer_rows)
    rest, rest_features = np.empty(0, np.int64), np.empty((0, *features.spec.shape), dtype or features.dtype)
    for buffer in buffers:
        waiting = np.concatenate([rest, buffer])
        whole = len(waiting) // batch_size * batch_size
        # Compressed rows are decompressed a buffer at a time, because a batch of them would decompress all the same
        # chunks.
        decompressed = features.prefetch(buffer)
        held = np.concatenate([rest_features, features.read(buffer, dtype)]) if decompressed else None
        for start in range(0, whole, batch_size):
            batch = waiting[start : start + batch_size]
            yield Batch(batch, features.read(batch, dtype) if held is None else held[start : start + batch_size].copy())
        rest = waiting[whole:]
        rest_features = features.read(rest, dtype) if held is None else held[whole:]
    if len(rest):
        yield Batch(rest, rest_features)


def shuffled_buffers(
    positions: npt.NDArray[np.int64], seed: int | Sequence[int], block_rows: int, buffer_rows: int
) -> Iterator[npt.NDArray[np.int64]]:
    """The positions as buffers, each a shuffle of some blocks; every position in exactly one."""
    generator = np.random.default_rng(seed)
    blocks = generator.permutation(-(-len(positions) // block_rows))
    per_buffer = buffer_rows // block_rows
    for first in range(0, len(blocks), per_buffer):
        chosen = [
            positions[block * block_rows : (block + 1) * block_rows]
            for block in blocks[first : first + per_buffer].tolist()
        ]
        yield generator.permutation(np.concatenate(chosen))
