"""Pairs of images that are nearly the same on two sides of a split.

N images, D numbers each: the pixels of small grey copies, or features. Each number is standardized
over the images, because the raw vectors of any two photographs of one kind point nearly the same
way; then likeness is the cosine.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# Above this many images a random part is compared: the pairs grow with the square.
MAX_IMAGES = 40_000
# The likest so many pairs are kept: in a set of thousands of like images every pair is one.
MAX_PAIRS = 100_000
# Directions in which pairs are compared first: distances only shrink in a projection, so no close
# pair is missed.
_DIRECTIONS = 48
_BLOCK = 2048  # rows of one block of cosines


@dataclass(frozen=True)
class LikePairs:
    """Pairs of images on two sides of a split, the likest first."""

    first: npt.NDArray[np.int64]  # (P,) positions
    second: npt.NDArray[np.int64]
    likeness: npt.NDArray[np.float32]  # (P,) cosine
    compared: int  # images


def like_pairs(
    vectors: npt.NDArray[Any],
    side: npt.NDArray[Any],
    min_cosine: float,
    *,
    max_images: int = MAX_IMAGES,
    max_pairs: int = MAX_PAIRS,
    seed: int = 0,
) -> LikePairs:
    """Return the pairs of rows with a cosine of at least `min_cosine` whose sides differ; the
    `max_pairs` likest where there are more.

    vectors: (N, D), one row per distinct image; side: (N,) any labels. Beyond `max_images` rows, as
    many drawn at random are compared.
    """
    compared_rows = np.arange(len(vectors))
    if len(compared_rows) > max_images:
        compared_rows = np.sort(
            np.random.default_rng(seed).choice(compared_rows, max_images, replace=False)
        )
    X = standardised(vectors[compared_rows])
    sides = np.unique(side, return_inverse=True)[1][compared_rows]
    projected = _projection(X)
    squares = (projected**2).sum(1)
    # |x - y|^2 = 2 - 2 cos for rows of length one; a little more room for rounding.
    max_distance = 2 - 2 * min_cosine + 1e-4
    close_pairs, likeness = np.empty((0, 2), np.int64), np.empty(0, np.float32)
    for start in range(0, len(X), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(X)))
        distances = (
            squares[block, None]
            + squares[None, start:]
            - 2 * (projected[block] @ projected[start:].T)
        )
        i, j = np.nonzero(distances <= max_distance)
        i, j = i + start, j + start
        across_sides = (i < j) & (sides[i] != sides[j])
        pairs = np.stack([i[across_sides], j[across_sides]], 1)
        cosines = _cosines(X, pairs)
        close_pairs = np.concatenate([close_pairs, pairs[cosines >= min_cosine]])
        likeness = np.concatenate([likeness, cosines[cosines >= min_cosine]])
        likest_first = np.argsort(-likeness, kind="stable")[:max_pairs]
        close_pairs, likeness = close_pairs[likest_first], likeness[likest_first]
    return LikePairs(
        compared_rows[close_pairs[:, 0]],
        compared_rows[close_pairs[:, 1]],
        likeness,
        len(compared_rows),
    )


def standardised(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return (N, d) rows of length one, of the columns that vary, each standardized."""
    X = np.asarray(vectors, np.float32).reshape(len(vectors), -1)
    X = X - X.mean(0)
    spread = X.std(0)
    # A column that hardly ever moves would weigh as much as any other, by its noise alone.
    varies = spread > 1e-3 * spread.max(initial=0)
    X = X[:, varies] / spread[varies]
    return np.asarray(X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12), np.float32)


def _cosines(X: npt.NDArray[np.float32], pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    cosines = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), _BLOCK):
        block = pairs[start : start + _BLOCK]
        cosines[start : start + _BLOCK] = (X[block[:, 0]] * X[block[:, 1]]).sum(1)
    return cosines


def _projection(X: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return X on its widest directions, computed from a few thousand rows; X itself where it has
    no more columns than those.
    """
    if X.shape[1] <= _DIRECTIONS:
        return X
    sample = X[:: max(1, len(X) // 4096)]
    _, directions = np.linalg.eigh(sample.T @ sample)
    return np.asarray(X @ directions[:, -_DIRECTIONS:], np.float32)
