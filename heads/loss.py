"""Logistic losses and their residuals for many heads on one tile of rows.

A heads, C classes, n rows. Arrays are class first and rows last, (C, A, n): a reduction over classes is then a sum of
contiguous runs, and a class's rows (tiles are sorted by class) are a slice. In the layout (n, A, C) the same operations
took several times as long as the matrix product that they follow, at 10 classes.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def softmax_loss(decision: Array, bounds: npt.NDArray[np.intp], weight: Array | None) -> Array:
    """Weighted cross-entropy (A,) float64 of decision (C, A, n), which becomes the residual: weight * (p - y).

    The last class's decision is computed here as minus the sum of the others': at an optimum of the L2 penalty the
    classes' weights sum to zero, so products are made for C - 1 classes only and the pivot is free.
    bounds (C + 1,): class k is rows bounds[k]:bounds[k + 1]. weight (A, n) or None.
    """
    classes = len(decision)
    np.sum(decision[:-1], axis=0, out=decision[-1])
    np.negative(decision[-1], out=decision[-1])
    decision -= decision.max(axis=0)
    own = np.empty_like(decision[0])
    for k in range(classes):
        own[:, bounds[k] : bounds[k + 1]] = decision[k, :, bounds[k] : bounds[k + 1]]
    np.exp(decision, out=decision)
    total = decision.sum(axis=0)
    own = np.log(total) - own
    np.reciprocal(total, out=total)
    if weight is not None:
        own *= weight
        total *= weight
    decision *= total
    for k in range(classes):
        rows = slice(bounds[k], bounds[k + 1])
        decision[k, :, rows] -= 1 if weight is None else weight[:, rows]
    return np.asarray(own.sum(axis=1, dtype=np.float64))


def sigmoid_loss(decision: Array, labels: Array, weight: Array | None) -> Array:
    """Weighted binary cross-entropy (A,) float64 of decision (1, A, n), which becomes weight * (p - y).

    labels (A, n) are 0 or 1, weight is (A, n) or None.
    """
    s = decision[0]
    small = np.exp(-np.abs(s))  # never overflows
    loss = np.log1p(small) + np.maximum(s, 0) - labels * s
    s[...] = np.where(s >= 0, 1, small) / (1 + small) - labels
    if weight is not None:
        loss *= weight
        s *= weight
    return np.asarray(loss.sum(axis=1, dtype=np.float64))


def softmax(decision: Array) -> Array:
    """Probabilities along the first axis."""
    p = np.exp(decision - decision.max(axis=0))
    return np.asarray(p / p.sum(axis=0))


def sigmoid(decision: Array) -> Array:
    """Logistic function without overflow."""
    small = np.exp(-np.abs(decision))
    return np.asarray(np.where(decision >= 0, 1, small) / (1 + small))
