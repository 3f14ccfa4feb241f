"""Pairs of images that are nearly the same on two sides of a split.

N images, D numbers each: the pixels of small grey copies, or features. The cosine of two rows is
their similarity.
"""

from dataclasses import dataclass

import numpy as np

from headrace.heads.arrays import Array, Floats, Index

# Of more images a random sample is compared: the number of pairs grows with the square.
MAX_IMAGES = 40_000
# Only the most similar pairs are kept: among thousands of images of one scene every pair counts.
MAX_PAIRS = 100_000
# Pairs are first compared in this many directions: a projection only shrinks distances, so it
# misses no close pair.
_DIRECTIONS = 48
_BLOCK = 2048  # rows of one block of cosines


@dataclass(frozen=True)
class SimilarPairs:
    """Pairs of images on two sides of a split, the most similar first."""

    first: Index  # (P,) positions
    second: Index
    similarity: Floats  # (P,) cosine
    compared: int  # images


def similar_pairs(
    vectors: Array, side: Array, min_cosine: float, *, max_pairs: int = MAX_PAIRS
) -> SimilarPairs:
    """Return the pairs of rows with a cosine of at least `min_cosine` whose sides differ; the
    `max_pairs` most similar where there are more.

    vectors: (N, D), one row per distinct image; side: (N,) any labels. Beyond MAX_IMAGES rows, as
    many drawn at random are compared.
    """
    compared_rows = np.arange(len(vectors))
    if len(compared_rows) > MAX_IMAGES:
        compared_rows = np.sort(
            np.random.default_rng(0).choice(compared_rows, MAX_IMAGES, replace=False)
        )
    X = standardized(vectors[compared_rows])
    sides = np.unique(side, return_inverse=True)[1][compared_rows]
    projected = _projection(X)
    squares = (projected**2).sum(1)
    # |x - y|^2 = 2 - 2 cos for rows of length one; 1e-4 more, so that float32 rounding loses none.
    max_distance = 2 - 2 * min_cosine + 1e-4
    close_pairs, similarity = np.empty((0, 2), np.int64), np.empty(0, np.float32)
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
        similarity = np.concatenate([similarity, cosines[cosines >= min_cosine]])
        closest_first = np.argsort(-similarity, kind="stable")[:max_pairs]
        close_pairs, similarity = close_pairs[closest_first], similarity[closest_first]
    return SimilarPairs(
        compared_rows[close_pairs[:, 0]],
        compared_rows[close_pairs[:, 1]],
        similarity,
        len(compared_rows),
    )


def standardized(vectors: Array) -> Floats:
    """Return (N, d) the d columns that vary, each standardized; then rows scaled to length 1."""
    # The raw vectors of any two photographs of one kind point nearly the same way.
    X = np.asarray(vectors, np.float32).reshape(len(vectors), -1)
    X = X - X.mean(0)
    spread = X.std(0)
    # A column that hardly ever moves would weigh as much as any other, by its noise alone.
    varies = spread > 1e-3 * spread.max(initial=0)
    X = X[:, varies] / spread[varies]
    return np.asarray(X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12), np.float32)


def _cosines(X: Floats, pairs: Index) -> Floats:
    cosines = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), _BLOCK):
        block = pairs[start : start + _BLOCK]
        cosines[start : start + _BLOCK] = (X[block[:, 0]] * X[block[:, 1]]).sum(1)
    return cosines


def _projection(X: Floats) -> Floats:
    """Return X in its directions of largest variance, estimated from a few thousand rows; X itself
    if it has no more columns than _DIRECTIONS.
    """
    if X.shape[1] <= _DIRECTIONS:
        return X
    # The directions change little with more rows; the product below grows with them.
    sample = X[:: max(1, len(X) // 4096)]
    _, directions = np.linalg.eigh(sample.T @ sample)
    return np.asarray(X @ directions[:, -_DIRECTIONS:], np.float32)
