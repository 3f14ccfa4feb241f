"""Likely label errors, by confident learning on out-of-fold predictions.

Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels"
(JAIR 70), section 3: a class's threshold is the mean probability of that class over the rows that
carry its label; a row belongs confidently to the most probable class whose threshold it reaches. A
row that belongs to another class than its label's is counted off the diagonal of the "confident
joint". N rows, C classes.
"""

import numpy as np

from headrace.heads.arrays import Array, Index


def confident_classes(label: Array, probabilities: Array) -> Index:
    """Return (N,) the class that each row confidently belongs to, -1 if it reaches no threshold.

    label: (N,) class index; probabilities: (N, C), by heads that did not train on the row.
    """
    predicted = np.asarray(probabilities, np.float64)
    counts = np.bincount(label, minlength=predicted.shape[1])
    label_sums = np.bincount(
        label, weights=predicted[np.arange(len(label)), label], minlength=predicted.shape[1]
    )
    # A class that no row carries has no threshold to pass.
    threshold = np.where(counts > 0, label_sums / np.maximum(counts, 1), np.inf)
    passes = predicted >= threshold
    best = np.where(passes, predicted, -1.0).argmax(1)
    return np.where(passes.any(1), best, -1)


def likely_label_errors(label: Array, probabilities: Array) -> Index:
    """Return the rows that confidently belong to another class than their label's, the clearest
    first: sorted by the label's probability less the largest of another class.
    """
    confident = confident_classes(label, probabilities)
    rows = np.flatnonzero((confident >= 0) & (confident != label))
    predicted = np.asarray(probabilities, np.float64)[rows]
    of_label = predicted[np.arange(len(rows)), label[rows]]
    of_others = predicted.copy()
    # Below every probability, so that the label itself is never the largest of the others.
    of_others[np.arange(len(rows)), label[rows]] = -1.0
    margin = of_label - of_others.max(1, initial=-1.0)
    return np.asarray(rows[np.argsort(margin, kind="stable")], np.int64)


def likely_errors_by_label(target: Array, probabilities: Array) -> tuple[Index, Index]:
    """Return rows (E,) and labels (E,) of the likely errors of a multi-label task, the clearest
    first. Each label column is a task of two classes.

    target: (N, L) 0/1; probabilities: (N, L).
    """
    rows, labels, margins = [], [], []
    for column in range(target.shape[1]):
        label_probability = np.asarray(probabilities[:, column], np.float64)
        labels_given = np.asarray(target[:, column], np.int64)
        error_rows = likely_label_errors(
            labels_given, np.stack([1 - label_probability, label_probability], 1)
        )
        rows.append(error_rows)
        labels.append(np.full(len(error_rows), column))
        margins.append(-np.abs(label_probability[error_rows] - labels_given[error_rows]))
    if not rows:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    order = np.argsort(np.concatenate(margins), kind="stable")
    return np.concatenate(rows)[order].astype(np.int64), np.concatenate(labels)[order].astype(
        np.int64
    )
