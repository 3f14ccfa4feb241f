"""Logistic losses and their residuals for many heads on one row block.

A heads, C classes, n rows. Decisions have the classes first and the rows last, (C, A, n): then a
reduction over classes adds contiguous arrays, and the rows of one class (row blocks are sorted by
class) are a slice. With the layout (n, A, C) and 10 classes the same operations took several times
as long as the matrix product before them.
"""

import numpy as np

from headrace.heads.arrays import Array, Index


def softmax_loss(decisions: Array, class_offsets: Index, row_weights: Array | None) -> Array:
    """Return the weighted cross-entropies (A,) float64 and overwrite the decisions by residuals.

    decisions: (C, A, n), of which the last class's are computed here; afterwards
    row_weights * (p - y).
    class_offsets: (C + 1,); the rows of class k are class_offsets[k]:class_offsets[k + 1].
    row_weights: (A, n), or None for weights of one.
    """
    n_classes = len(decisions)
    # With an L2 penalty the weights of all classes sum to zero at the optimum. So the last class's
    # decisions are minus the sum of the others, and need no product.
    np.sum(decisions[:-1], axis=0, out=decisions[-1])
    np.negative(decisions[-1], out=decisions[-1])
    decisions -= decisions.max(axis=0)
    true_decision = np.empty_like(decisions[0])
    class_rows = [slice(class_offsets[k], class_offsets[k + 1]) for k in range(n_classes)]
    for k, rows in enumerate(class_rows):
        true_decision[:, rows] = decisions[k, :, rows]
        decisions[k, :, rows] = -np.inf
    np.exp(decisions, out=decisions)
    # Loss and residual of a confidently classified row are computed from the sum of the wrong
    # classes' probabilities. As log(total) and 1 - p they would be rounding errors: heads of
    # separable rows took hundreds of iterations, and still missed the gap.
    wrong_mass = decisions.sum(axis=0)
    total_mass = wrong_mass + np.exp(true_decision)
    loss = np.where(true_decision == 0, np.log1p(wrong_mass), np.log(total_mass)) - true_decision
    np.reciprocal(total_mass, out=total_mass)
    if row_weights is not None:
        loss *= row_weights
        total_mass *= row_weights
    decisions *= total_mass
    wrong_mass *= total_mass
    for k, rows in enumerate(class_rows):
        decisions[k, :, rows] = -wrong_mass[:, rows]
    return np.asarray(loss.sum(axis=1, dtype=np.float64))


def sigmoid_loss(decisions: Array, labels: Array, row_weights: Array | None) -> Array:
    """Return the weighted binary cross-entropies (A,) float64 and overwrite the decisions.

    decisions: (1, A, n); afterwards row_weights * (p - y). labels: (A, n), 0 or 1.
    row_weights: (A, n), or None for weights of one.
    """
    logit = decisions[0]
    exp_minus_abs = np.exp(-np.abs(logit))  # never overflows
    loss = np.log1p(exp_minus_abs) + (np.maximum(logit, 0) - labels * logit)
    # The numerator of p - y, in each case in a form without a difference from one, which would
    # round it.
    numerator = np.where(
        logit >= 0, np.where(labels > 0, -exp_minus_abs, 1), np.where(labels > 0, -1, exp_minus_abs)
    )
    logit[...] = numerator / (1 + exp_minus_abs)
    if row_weights is not None:
        loss *= row_weights
        logit *= row_weights
    return np.asarray(loss.sum(axis=1, dtype=np.float64))


def softmax(decisions: Array) -> Array:
    """Return probabilities along the first axis."""
    p = np.exp(decisions - decisions.max(axis=0))
    return np.asarray(p / p.sum(axis=0))


def sigmoid(decisions: Array) -> Array:
    """Return the logistic function, computed without overflow."""
    exp_minus_abs = np.exp(-np.abs(decisions))
    return np.asarray(np.where(decisions >= 0, 1, exp_minus_abs) / (1 + exp_minus_abs))
