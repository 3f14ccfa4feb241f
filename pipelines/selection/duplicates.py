"""Images that are nearly the same on two sides of a split: what a network has all but seen, it need
not recognise.

N images, D numbers each: the pixels of small grey copies, or features. Each number is standardised
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
_BLOCK = 2048


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
    alike: float,
    *,
    max_images: int = MAX_IMAGES,
    max_pairs: int = MAX_PAIRS,
    seed: int = 0,
) -> LikePairs:
    """The pairs of rows with cosine `alike` or more whose sides differ; the `max_pairs` likest
    where there are more.

    vectors: (N, D), one row per distinct image; side: (N,) any labels. Beyond `max_images` rows, of
    as many drawn at random.
    """
    drawn = np.arange(len(vectors))
    if len(drawn) > max_images:
        drawn = np.sort(np.random.default_rng(seed).choice(drawn, max_images, replace=False))
    X = standardised(vectors[drawn])
    sides = np.unique(side, return_inverse=True)[1][drawn]
    near = _projection(X)
    squares = (near**2).sum(1)
    # |x - y|^2 = 2 - 2 cos for rows of length one; a little more room for rounding.
    reach = 2 - 2 * alike + 1e-4
    found, likeness = np.empty((0, 2), np.int64), np.empty(0, np.float32)
    for start in range(0, len(X), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(X)))
        distance = squares[rows, None] + squares[None, start:] - 2 * (near[rows] @ near[start:].T)
        i, j = np.nonzero(distance <= reach)
        i, j = i + start, j + start
        keep = (i < j) & (sides[i] != sides[j])
        pairs = np.stack([i[keep], j[keep]], 1)
        exact = _cosines(X, pairs)
        found = np.concatenate([found, pairs[exact >= alike]])
        likeness = np.concatenate([likeness, exact[exact >= alike]])
        order = np.argsort(-likeness, kind="stable")[:max_pairs]
        found, likeness = found[order], likeness[order]
    return LikePairs(drawn[found[:, 0]], drawn[found[:, 1]], likeness, len(drawn))


def standardised(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """(N, d) rows of length one, of the columns that move, each standardised."""
    X = np.asarray(vectors, np.float32).reshape(len(vectors), -1)
    X = X - X.mean(0)
    spread = X.std(0)
    # A column that hardly ever moves would weigh as much as any other, by its noise alone.
    moves = spread > 1e-3 * spread.max(initial=0)
    X = X[:, moves] / spread[moves]
    return np.asarray(X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12), np.float32)


def _cosines(X: npt.NDArray[np.float32], pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    found = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), _BLOCK):
        part = pairs[start : start + _BLOCK]
        found[start : start + _BLOCK] = (X[part[:, 0]] * X[part[:, 1]]).sum(1)
    return found


def _projection(X: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """X on its widest directions, found on a few thousand rows; X itself where it has no more
    columns than those.
    """
    if X.shape[1] <= _DIRECTIONS:
        return X
    sample = X[:: max(1, len(X) // 4096)]
    _, directions = np.linalg.eigh(sample.T @ sample)
    return np.asarray(X @ directions[:, -_DIRECTIONS:], np.float32)
