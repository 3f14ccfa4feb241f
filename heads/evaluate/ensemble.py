"""Averages of heads: which heads, and how often.

Nothing is trained; only stored predictions are read.

K heads, N rows, C outputs, E elements. Heads are picked greedily with replacement (Caruana,
Niculescu-Mizil, Crew and Ksikes 2004, "Ensemble selection from libraries of models"): each round
adds the head that lowers the loss of the average most. The loss is log loss (regression: squared
error) whatever the metric: accuracy moves in steps of one row, and its best average on the rows at
hand is mostly luck.

The loss of an average needs one number per row and head, its element: the probability of the true
class, or of the true value of a label, or the residual. Elements average as predictions do, so K
heads are tried as one (K, E) array.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.data.task import TaskKind

Array = npt.NDArray[Any]

_SMALLEST = float(
    np.finfo(np.float32).eps
)  # probabilities are clipped there, as in the metric log_loss


@dataclass(frozen=True)
class EnsembleLimits:
    """What an ensemble may cost."""

    members: int = 8  # different heads
    networks: int | None = None  # forward passes per image
    # each network beyond the first must lower the loss by this share
    min_gain_per_backbone: float = 0.01
    rounds: int = 30  # picks, the same head more than once being its weight


def loss_elements(kind: TaskKind, target: Array, predicted: Array) -> npt.NDArray[np.float32]:
    """(K, E) elements of predictions (K, N, C):

    E = N for one label per row, else N × C, row by row.
    """
    if kind == "single":
        chosen = np.take_along_axis(predicted, np.asarray(target, np.int64)[None, :, None], 2)[
            ..., 0
        ]
        return np.asarray(chosen / predicted.sum(2), np.float32)
    wanted = np.asarray(target, np.float64).reshape(len(target), -1)
    predicted = predicted.reshape(*predicted.shape[:2], -1)
    if kind == "multi":
        return np.asarray(np.where(wanted >= 0.5, predicted, 1 - predicted), np.float32).reshape(
            len(predicted), -1
        )
    deviation = wanted.std(0)
    residual = (predicted - wanted) / np.where(deviation > 0, deviation, 1)
    return np.asarray(residual, np.float32).reshape(len(predicted), -1)


def element_loss(kind: TaskKind, elements: Array) -> Array:
    """The loss over the last axis: mean of -log of probabilities (nats), of squares of residuals
    for regression.
    """
    if kind == "regression":
        return np.asarray(np.square(elements).mean(-1, dtype=np.float64))
    return np.asarray(-np.log(np.clip(elements, _SMALLEST, 1)).mean(-1, dtype=np.float64))


def greedy_weights(
    kind: TaskKind, elements: Array, networks: Sequence[AbstractSet[str]], limits: EnsembleLimits
) -> npt.NDArray[np.float64]:
    """(K,) weights that sum to one, zero for most heads. networks: the forward passes that each
    head needs.

    Ties go to the first, so order the heads from cheap to dear. The best average of all rounds is
    taken.
    """
    heads = len(elements)
    total, counts = np.zeros(elements.shape[1], np.float32), np.zeros(heads)
    used: set[str] = set()
    best_loss, best_counts = np.inf, counts
    most = limits.networks or len(set().union(*networks))
    for done in range(limits.rounds):
        needed = np.array([len(used | own) for own in networks])
        allowed = needed <= max(most, len(used))
        if np.count_nonzero(counts) >= limits.members:
            allowed &= counts > 0
        if not allowed.any():
            break
        tried = np.flatnonzero(allowed)
        loss = element_loss(kind, (total + elements[tried]) / (done + 1))
        priced = loss * (1 + limits.min_gain_per_backbone * np.maximum(needed[tried] - 1, 0))
        place = int(priced.argmin())
        pick = tried[place]
        total, counts = total + elements[pick], counts.copy()
        counts[pick] += 1
        used |= networks[pick]
        if priced[place] < best_loss * (1 - 1e-6):
            best_loss, best_counts = float(priced[place]), counts
    return np.asarray(best_counts / max(best_counts.sum(), 1))


def average(weights: Array, predicted: Array) -> npt.NDArray[np.float64]:
    """(N, C) the weighted mean of predictions (K, N, C)."""
    return np.asarray(np.tensordot(weights, predicted.astype(np.float64), 1))
