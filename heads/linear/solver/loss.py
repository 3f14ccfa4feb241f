"""Logistic losses and their residuals for many heads on one tile of rows.

A heads, C classes, n rows. Arrays are class first and rows last, (C, A, n): a reduction over
classes is then a sum of contiguous runs, and a class's rows (tiles are sorted by class) are a
slice. In the layout (n, A, C) the same operations took several times as long as the matrix product
that they follow, at 10 classes.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def softmax_loss(decision: Array, bounds: npt.NDArray[np.intp], weight: Array | None) -> Array:
    """Weighted cross-entropy (A,) float64 of decision (C, A, n), which becomes the residual: weight
    * (p - y).

    The last class's decision is computed here as minus the sum of the others': at an optimum of the
    L2 penalty the classes' weights sum to zero, so products are made for C - 1 classes only and the
    pivot is free. bounds (C + 1,): class k is rows bounds[k]:bounds[k + 1]. weight (A, n) or None.
    """
    classes = len(decision)
    np.sum(decision[:-1], axis=0, out=decision[-1])
    np.negative(decision[-1], out=decision[-1])
    decision -= decision.max(axis=0)
    own = np.empty_like(decision[0])
    owners = [(k, slice(bounds[k], bounds[k + 1])) for k in range(classes)]
    for k, rows in owners:
        own[:, rows] = decision[k, :, rows]
        decision[k, :, rows] = -np.inf
    np.exp(decision, out=decision)
    # A row that is all but sure has a loss and residuals as small as the other classes'
    # probabilities: they are sums of those, since 1 - p and log(total) would be rounding alone.
    others = decision.sum(axis=0)
    total = others + np.exp(own)
    loss = np.where(own == 0, np.log1p(others), np.log(total)) - own
    np.reciprocal(total, out=total)
    if weight is not None:
        loss *= weight
        total *= weight
    decision *= total
    others *= total
    for k, rows in owners:
        decision[k, :, rows] = -others[:, rows]
    return np.asarray(loss.sum(axis=1, dtype=np.float64))


def sigmoid_loss(decision: Array, labels: Array, weight: Array | None) -> Array:
    """Weighted binary cross-entropy (A,) float64 of decision (1, A, n), which becomes weight * (p -
    y).

    labels (A, n) are 0 or 1, weight is (A, n) or None.
    """
    s = decision[0]
    small = np.exp(-np.abs(s))  # never overflows
    loss = np.log1p(small) + (np.maximum(s, 0) - labels * s)
    # Of p - y, whichever is not rounded beside a one.
    part = np.where(s >= 0, np.where(labels > 0, -small, 1), np.where(labels > 0, -1, small))
    s[...] = part / (1 + small)
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
